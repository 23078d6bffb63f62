"""The Transformer against torch.nn.Transformer, and its decoding against search without a cache."""

import itertools

import pytest
import torch

from fastattn.models.attention import Attention, KeyValueCache
from fastattn.models.decoding import beam_search, greedy
from fastattn.models.layers import DecoderLayer, EncoderLayer
from fastattn.models.transformer import Transformer, TransformerConfig, translation_loss

IMPLEMENTATIONS = ("fastattn", "torch", "naive")
SOURCE = torch.tensor([[5, 6, 7, 2, 0, 0], [4, 5, 9, 6, 7, 2], [8, 2, 0, 0, 0, 0]])
TARGET = torch.tensor([[1, 8, 9, 3], [1, 7, 8, 0], [1, 4, 0, 0]])


def small(attention="fastattn", seed=0, **options):
    torch.manual_seed(seed)
    options = {"vocab_size": 12, "embed_dim": 16, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0} | options
    return Transformer(TransformerConfig(attention=attention, **options)).eval()


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_attention_is_torchs_multihead_attention(attention):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    ours = Attention(16, 4, implementation=attention)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [3]])
    expected = theirs(query, key, value, key_padding_mask=padding, average_attn_weights=True)
    by_mask = ours(query, key, value, key_padding_mask=padding)
    by_lengths = ours(query, key, value, key_lengths=torch.tensor([7, 3]))
    torch.testing.assert_close(by_mask, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_lengths, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weights(query, key, key_padding_mask=padding), expected[1])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(query, query, query, attn_mask=causal, need_weights=False)[0]
    torch.testing.assert_close(ours(query, causal=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_layers_load(norm_first, activation):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "activation": activation, "norm_first": norm_first}
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    ours = EncoderLayer(16, 2, 32, **options)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, **options)
    ours = DecoderLayer(16, 2, 32, **options)
    ours.load_state_dict(theirs.state_dict())
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(ours(x, memory), theirs(x, memory, tgt_mask=mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_whole_transformer_loads(norm_first):
    torch.manual_seed(0)
    theirs = torch.nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True, norm_first=norm_first).eval()
    ours = small(norm_first=norm_first)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all("embedding" in name or name == "output.weight" for name in missing)
    x, y = ours.embed(ours.source_embedding, SOURCE), ours.embed(ours.target_embedding, TARGET)
    padding = SOURCE == 0
    expected = theirs(
        x,
        y,
        tgt_mask=theirs.generate_square_subsequent_mask(4),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    actual = torch.nn.functional.linear(expected, ours.output.weight)
    torch.testing.assert_close(ours(SOURCE, TARGET), actual, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_implementations_agree_on_outputs_and_gradients(positions):
    results = []
    for attention in IMPLEMENTATIONS:
        model = small(attention, positions=positions)
        logits = model(SOURCE, TARGET)
        translation_loss(logits, TARGET.roll(-1, 1), 0, 0.1).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for ours, torchs, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(torchs, naive, atol=2e-5, rtol=1e-4)


def test_loss_curves_coincide_over_100_steps():
    generator = torch.Generator().manual_seed(5)
    sources = torch.randint(3, 12, (20, 16, 7), generator=generator)
    sources[:, ::3, 5:] = 0
    curves = []
    for attention in IMPLEMENTATIONS:
        model = small(attention).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        curve = []
        for step in range(100):
            source = sources[step % 20]
            target = torch.cat((torch.ones(16, 1, dtype=torch.long), source.flip(1)), dim=1)
            loss = translation_loss(model(source, target[:, :-1]), target[:, 1:], 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    ours, torchs, naive = curves
    assert naive[-1] < 0.8 * naive[0]
    assert (ours - naive).abs().max() < 1e-3
    assert (ours - torchs).abs().max() < 1e-3


def test_padding_changes_nothing():
    model = small()
    alone = model(SOURCE[2:3, :2], TARGET[2:3, :2])
    torch.testing.assert_close(model(SOURCE, TARGET)[2:3, :2], alone, atol=1e-5, rtol=1e-5)


def test_embeddings_are_tied_or_not():
    tied, untied = small(), small(tied_embeddings=False)
    assert tied.output.weight is tied.source_embedding.weight is tied.target_embedding.weight
    assert untied.output.weight is not untied.source_embedding.weight
    assert untied.target_embedding.weight is not untied.source_embedding.weight


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_cached_steps_equal_teacher_forcing(positions):
    model = small(positions=positions)
    with torch.no_grad():
        expected = model(SOURCE, TARGET)
        memory, lengths = model.encode(SOURCE)
        states = model.decoder.start(memory, 4)
        for t in range(4):
            actual = model.decode_step(TARGET[:, t], memory, lengths, states)
            torch.testing.assert_close(actual, expected[:, t], atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
            model.decode_step(TARGET[:, 0], memory, lengths, states)


def search_space(model, source, length):
    """(log-probability, tokens) of every possible translation of one source, by teacher forcing."""
    words = [w for w in range(model.config.vocab_size) if w not in (0, 1, 2)]
    found = []
    for n in range(length + 1):
        for body in itertools.product(words, repeat=n):
            tokens = [*body, 2] if n < length else list(body)
            logits = model(source, torch.tensor([[1, *tokens[:-1]]])).float()
            logits[:, :, :2] = float("-inf")
            log_probability = logits.log_softmax(-1)[0, range(len(tokens)), tokens].sum().item()
            found.append((log_probability, tokens))
    return found


@torch.no_grad()
def test_wide_beam_finds_what_exhaustive_search_finds():
    model = small(vocab_size=6, seed=3)
    source = torch.tensor([[3, 4, 5, 2]])
    ranked = sorted(
        ((p / ((5 + len(tokens)) / 6) ** 0.6, tokens) for p, tokens in search_space(model, source, 3)), reverse=True
    )
    tokens, scores = beam_search(model, source, beam_size=50, max_length=3)
    for (score, expected), got, got_score in zip(ranked[:10], tokens[0], scores[0], strict=False):
        assert [t for t in got.tolist() if t] == expected
        assert got_score.item() == pytest.approx(score, abs=1e-4)


@torch.no_grad()
def test_beam_of_one_is_greedy_and_batches_do_not_mix():
    model = small(seed=1)
    together = greedy(model, SOURCE, max_length=8)
    beam = beam_search(model, SOURCE, beam_size=1, max_length=8)[0][:, 0]
    assert torch.equal(together, beam)
    wide = beam_search(model, SOURCE, beam_size=3, max_length=8)[0]
    for row in range(3):
        length = int((SOURCE[row] != 0).sum())
        source = SOURCE[row : row + 1, :length]
        alone = greedy(model, source, max_length=8)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        best = beam_search(model, source, beam_size=3, max_length=8)[0]
        assert torch.equal(wide[row, :, : best.shape[2]], best[0])


def test_cross_attention_is_a_distribution_over_the_source():
    maps = small().cross_attention(SOURCE, TARGET)
    assert maps.shape == (2, 3, 4, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4))
    assert (maps[:, 0, :, 4:] == 0).all()


def test_label_smoothing_by_hand():
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]]])
    target = torch.tensor([[2, 0]])  # the second position is padding
    log_p = torch.log(torch.softmax(logits[0, 0], -1))
    expected = -(0.9 * log_p[2] + 0.1 * log_p.mean())
    torch.testing.assert_close(translation_loss(logits, target, 0, 0.1), expected)


def test_errors():
    with pytest.raises(ValueError, match="'flash'"):
        Attention(8, 2, implementation="flash")
    with pytest.raises(ValueError, match=r"embed_dim \(9\).*num_heads \(2\)"):
        Attention(9, 2)
    with pytest.raises(ValueError, match="'tanh'"):
        EncoderLayer(8, 2, 16, activation="tanh")
    with pytest.raises(ValueError, match="holds 2 positions, 3 are needed"):
        KeyValueCache(2).append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
