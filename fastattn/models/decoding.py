"""Greedy and beam search over a :class:`~fastattn.models.transformer.Transformer`, with key/value caches."""

from __future__ import annotations

import torch

from fastattn.models.transformer import Transformer


@torch.no_grad()
def greedy(model: Transformer, source: torch.Tensor, max_length: int | None = None) -> torch.Tensor:
    """The likeliest token at each step: int64 ``[B, L]``, ending in ``eos_id``, padded with ``pad_id``.

    ``source`` is ``[B, Ls]``; at most ``max_length`` tokens (default: the model's) are produced.
    """
    config = model.config
    max_length = max_length or config.max_length
    memory, lengths = model.encode(source)
    states = model.decoder.start(memory, max_length)
    token = torch.full((source.shape[0],), config.bos_id, dtype=torch.long, device=source.device)
    finished = torch.zeros_like(token, dtype=torch.bool)
    produced = []
    for _ in range(max_length):
        token = _next_scores(model, token, memory, lengths, states).argmax(-1)
        token = token.masked_fill(finished, config.pad_id)
        produced.append(token)
        finished = finished | (token == config.eos_id)
        if finished.all():
            break
    return torch.stack(produced, dim=1)


@torch.no_grad()
def beam_search(
    model: Transformer,
    source: torch.Tensor,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    max_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best ``beam_size`` hypotheses: tokens ``[B, K, L]`` (padded after ``eos_id``), scores ``[B, K]``.

    At every step the K likeliest continuations over all hypotheses are kept; a finished hypothesis
    stays in the beam at its probability.  The final order is by log-probability divided by
    ``((5 + length) / 6) ** length_penalty`` (Wu et al., 2016), best first.
    """
    config = model.config
    max_length = max_length or config.max_length
    batch, device = source.shape[0], source.device
    memory, lengths = model.encode(source)
    memory, lengths = memory.repeat_interleave(beam_size, 0), lengths.repeat_interleave(beam_size, 0)
    states = model.decoder.start(memory, max_length)

    token = torch.full((batch * beam_size,), config.bos_id, dtype=torch.long, device=device)
    log_probability = torch.full((batch, beam_size), float("-inf"), device=device)
    log_probability[:, 0] = 0.0  # the K copies of the empty hypothesis are one
    tokens = torch.empty(batch, beam_size, 0, dtype=torch.long, device=device)
    finished = torch.zeros(batch, beam_size, dtype=torch.bool, device=device)
    stay = torch.full((config.vocab_size,), float("-inf"), device=device)
    stay[config.pad_id] = 0.0  # a finished hypothesis has one continuation, free of charge
    first_row = torch.arange(batch, device=device)[:, None] * beam_size

    for _ in range(max_length):
        step = _next_scores(model, token, memory, lengths, states).log_softmax(-1)
        step = torch.where(finished[:, :, None], stay, step.view(batch, beam_size, -1))  # [B, K, V]
        total = (log_probability[:, :, None] + step).flatten(1)  # [B, K * V]
        log_probability, best = total.topk(beam_size, dim=1)
        parent, word = best // config.vocab_size, best % config.vocab_size
        tokens = torch.cat((tokens.gather(1, parent[:, :, None].expand_as(tokens)), word[:, :, None]), dim=2)
        finished = finished.gather(1, parent) | (word == config.eos_id)
        if finished.all():
            break
        rows = (first_row + parent).flatten()
        for state in states:
            state.cache.select(rows)  # the memory's rows are alike within one beam
        token = word.flatten()

    length = (tokens != config.pad_id).sum(2)
    score = log_probability / ((5 + length) / 6) ** length_penalty
    score, order = score.sort(dim=1, descending=True)
    return tokens.gather(1, order[:, :, None].expand_as(tokens)), score


def _next_scores(model: Transformer, token, memory, lengths, states) -> torch.Tensor:
    """Float32 logits ``[B, V]`` of the next token; padding and a second beginning are never produced."""
    scores = model.decode_step(token, memory, lengths, states).float()
    scores[:, [model.config.pad_id, model.config.bos_id]] = float("-inf")
    return scores
