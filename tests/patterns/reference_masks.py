"""Dense boolean masks of every pattern and boundary, written apart from the planner.

What only the data decides (which columns, diagonals, strides and phases) is read from the planner's
choice and tested elsewhere; what those choices mean is spelled out here, pair by pair.
"""

import torch
from permattn import TokenGrid
from permattn.patterns.mminference.lines import choose_lines
from permattn.patterns.mminference.probing import Prober
from permattn.patterns.mminference.prompt import describe_prompt
from permattn.patterns.mminference.streams import describe_streams

BLOCK = 64


def lines_of(q, k, rows, heads, left=None, right=None):
    """The prompt, and what the planner chose for every stream."""
    batch = q.shape[0]
    zero = (0,) * batch
    segments = tuple(tuple(r) for r in (rows or [()] * batch))
    prompt = describe_prompt(
        segments, q.shape[2], k.shape[2], left or zero, right or zero, q.device
    )
    prober = Prober(q, k, prompt, heads)
    return prompt, [(s, choose_lines(prober, s)) for s in describe_streams(prompt, tuple(heads))]


def labels_of(row, n, first, stop):
    """The modality of every position as a list of words; None = padding."""
    label = ["text"] * n
    for segment in row:
        if isinstance(segment, TokenGrid):
            starts = segment.frame_starts or [
                segment.start + i * segment.height * segment.width for i in range(segment.frames)
            ]
            places = [s + i for s in starts for i in range(segment.height * segment.width)]
        else:
            places = range(segment.start, segment.start + segment.length)
        for place in places:
            if place < n:
                label[place] = segment.modality
    return [None if not first <= i < stop else x for i, x in enumerate(label)]


def wanted(q, k, rows, heads, prompt, chosen):
    """What must be seen: bool [B, H, Sq, Skv], and what may be seen at all."""
    batch, sq, skv = q.shape[0], q.shape[2], k.shape[2]
    want = torch.zeros(batch, len(heads), sq, skv, dtype=torch.bool)
    legal = want.clone()
    i = torch.arange(sq) + skv - sq
    lag = i[:, None] - torch.arange(skv)
    for b in range(batch):
        first, stop = prompt.first[b], prompt.stop[b]
        label = labels_of(rows[b] if rows else [], skv, first, stop)
        valid = torch.tensor([x is not None for x in label])
        legal[b] = (lag >= 0) & valid & valid[i][:, None]
        for stream, lines in chosen:
            is_key = valid & torch.tensor([stream.key in (None, x) for x in label])
            is_query = valid & torch.tensor([stream.query in (None, x) for x in label])
            for h, whole in enumerate(heads):
                kind = {"none": "nn", "k": "nn", "q": "qn", "2d": "qq"}[whole.boundary]
                has = "".join("n" if x is None else "q" for x in (stream.query, stream.key))
                if kind != has:
                    continue
                head = dict(whole.when).get(
                    {"q": stream.query, "2d": f"{stream.query},{stream.key}"}.get(whole.boundary),
                    whole,
                )
                mask = _pattern(q, k, b, h, head, stream, lines, is_query, is_key, lag, first)
                want[b, h] |= mask & is_key & is_query[i][:, None]
    return want & legal, legal


def _pattern(q, k, b, h, head, stream, lines, is_query, is_key, lag, first):
    skv = lag.shape[1]
    i, j = torch.arange(lag.shape[0]) + skv - lag.shape[0], torch.arange(skv)
    local = skv if head.pattern == "dense" else head.local
    mask = (lag < local) | (j < first + head.sink)
    mask |= lines.columns[b, h] | lines.rows[b, h][:, None]
    if head.pattern in ("a_shape", "tri_shape", "dense", "block_sparse"):
        assert not (lines.columns[b, h] & (j >= first + head.sink)).any()
    # With a 2D-boundary lags count tokens of the modality, where query and key share one.
    same = stream.key is not None and stream.key == stream.query
    rank = is_key.cumsum(0) - 1
    distance = rank[i][:, None] - rank if same else lag
    for slash in lines.slashes[b, h].tolist() if lines.slashes.shape[-1] else []:
        mask |= (distance == slash) & (slash >= 0)
    for video in lines.grids[b] if lines.grids else ():
        stride = int(video.s_stride[h])
        if stride:
            token = video.grid.host_tokens
            rank_of = torch.full((skv,), -1)
            rank_of[token] = torch.arange(len(token))
            both = (rank_of[i] >= 0)[:, None] & (rank_of >= 0)
            step = (rank_of[i][:, None] - rank_of) % stride
            mask |= both & (step == int(video.s_phase[h]))
    if head.pattern == "block_sparse":
        mask |= _blocks(q, k, b, h, head, stream, is_query, is_key, lag) & (lag >= local)
    return mask


def _blocks(q, k, b, h, head, stream, is_query, is_key, lag):
    """The key blocks of highest pooled score of every query block."""
    skv = lag.shape[1]
    offset = skv - lag.shape[0]
    compact = stream.key is not None
    key_place = is_key.cumsum(0) - 1 if compact else torch.arange(skv)
    query_place = (is_query.cumsum(0) - 1 if compact else torch.arange(skv)).clone()
    query_place -= int(is_query[:offset].sum()) if compact else offset
    key_head = h // (q.shape[1] // k.shape[1])
    mask = torch.zeros_like(lag, dtype=torch.bool)
    for block in range(-(-skv // BLOCK)):
        queries = torch.nonzero(is_query & (query_place // BLOCK == block))[:, 0]
        queries = queries[queries >= offset]
        if len(queries) == 0:
            continue
        mean = q[b, h, queries - offset].float().mean(0)
        scores = {}
        for other in range(-(-skv // BLOCK)):
            keys = torch.nonzero(is_key & (key_place // BLOCK == other))[:, 0]
            if len(keys) and int(queries.max()) - int(keys.min()) >= head.local:
                scores[other] = float(mean @ k[b, key_head, keys].float().mean(0))
        total = sum(torch.tensor(list(scores.values())).mul(q.shape[-1] ** -0.5).exp().tolist())
        held = 0.0
        ranked = sorted(scores, key=lambda x: (-scores[x], x))[: head.blocks]
        for other in ranked:
            if head.coverage is not None and held >= head.coverage:
                break
            held += float(torch.tensor(scores[other] * q.shape[-1] ** -0.5).exp()) / total
            keys = torch.nonzero(is_key & (key_place // BLOCK == other))[:, 0]
            mask[(queries - offset)[:, None], keys] = True
    return mask
