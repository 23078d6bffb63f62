"""The classifier: padding, agreement of the implementations, what it says about its attention."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.models.classifier import ENCODERS, Classifier, ClassifierConfig

IMPLEMENTATIONS = ("fastattn", "torch", "naive")
TOKENS = torch.tensor([[4, 5, 6, 0, 0], [7, 8, 9, 3, 4], [5, 0, 0, 0, 0]])
LENGTHS = torch.tensor([3, 5, 1])


def small(seed=0, **options):
    torch.manual_seed(seed)
    options = {"num_classes": 3, "vocab_size": 10, "embed_dim": 16, "num_heads": 2, "dropout": 0.0} | options
    return Classifier(ClassifierConfig(**options))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pooling", ["dot", "additive"])
def test_padding_changes_nothing(encoder, pooling):
    model = small(encoder=encoder, pooling=pooling).eval()
    logits = model(TOKENS, LENGTHS)
    assert logits.shape == (3, 3)
    for row, length in enumerate(LENGTHS):
        alone = model(TOKENS[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_order_matters(encoder):
    model = small(encoder=encoder).eval()
    a = model(torch.tensor([[4, 5, 6, 7]]), torch.tensor([4]))
    b = model(torch.tensor([[7, 5, 6, 4]]), torch.tensor([4]))
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("pooling", ["dot", "additive"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_implementations_agree_on_outputs_and_gradients(encoder, pooling):
    results = []
    for attention in IMPLEMENTATIONS:
        model = small(encoder=encoder, pooling=pooling, attention=attention)
        logits = model(TOKENS, LENGTHS)
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for ours, torchs, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(torchs, naive, atol=2e-5, rtol=1e-4)


def test_loss_curves_coincide_over_100_steps():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 10, (10, 16, 9), generator=generator)
    lengths = torch.randint(1, 10, (10, 16), generator=generator)
    curves = []
    for attention in IMPLEMENTATIONS:
        model = small(attention=attention)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        curve = []
        for step in range(100):
            x, n = tokens[step % 10], lengths[step % 10]
            loss = F.cross_entropy(model(x, n), (x[:, 0] % 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    ours, torchs, naive = curves
    assert naive[-1] < 0.8 * naive[0]
    assert (ours - naive).abs().max() < 1e-3
    assert (ours - torchs).abs().max() < 1e-3


def test_explains_with_the_weights_that_it_used():
    model = small().eval()
    logits, weights = model.explain(TOKENS, LENGTHS)
    torch.testing.assert_close(logits, model(TOKENS, LENGTHS))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert (weights[0, 3:] == 0).all()


def test_feature_vectors_as_input():
    model = small(vocab_size=None, input_dim=4).eval()
    assert model(torch.randn(2, 6, 4), torch.tensor([6, 2])).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 4}, "either vocab_size"),
        ({"encoder": "gru"}, "'gru'"),
        ({"encoder": "cnn", "kernel_size": 4}, "odd, got 4"),
        ({"encoder": "bilstm", "embed_dim": 15}, "even embed_dim, got 15"),
        ({"pooling": "mean"}, "'mean'"),
        ({"positions": "spiral"}, "'spiral'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
