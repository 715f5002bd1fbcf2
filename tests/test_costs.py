"""MACs against figures by hand, for every kind of product, however it is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decay_pruning import GraphError, measure
from decay_pruning.counting import count

T, D, H = 7, 24, 4  # tokens, width, heads; a head is 6 wide


class Attention(nn.Module):
    """As in timm: one layer for queries, keys and values."""

    def __init__(self, kind="sdpa", kv=H):
        super().__init__()
        self.kind, self.kv = kind, kv
        self.qkv = nn.Linear(D, (H + 2 * kv) * (D // H))
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            self.qkv(x).view(b, t, H + 2 * self.kv, D // H).transpose(1, 2).split([H, self.kv, self.kv], 1)
        )
        if self.kind == "gqa":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (each.repeat_interleave(H // self.kv, dim=1) for each in (k, v))
            if self.kind == "sdpa":
                out = F.scaled_dot_product_attention(q, k, v)
            elif self.kind == "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
                out = torch.einsum("bhqk,bhkd->bhqd", scores, v)
            else:
                out = (q @ k.mT).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, t, D))


class Block(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(D), Attention(**how), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def macs(model, x):
    return measure(model, x).macs


PRODUCTS = 2 * T * T * D  # of attention: scores, and scores times values


@pytest.mark.parametrize("kind", ["sdpa", "eager", "einsum", "gqa"])
@pytest.mark.parametrize("kv", [H, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_transformer_block(kind, kv, batch):
    by_hand = T * D * (D + 2 * kv * D // H) + PRODUCTS + T * D * D + 2 * T * D * 2 * D
    assert macs(Block(kind=kind, kv=kv), torch.randn(batch, T, D)) == batch * by_hand


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(weights, training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(D, H, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=weights)[0]

    model = Net().train(training)
    assert macs(model, torch.randn(1, T, D)) == 4 * T * D * D + PRODUCTS
    assert torch.backends.mha.get_fastpath_enabled() and model.training == training


def test_a_transformer_encoder_on_its_fast_path():
    layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert macs(model.eval(), torch.randn(1, T, D)) == 2 * (8 * T * D * D + PRODUCTS)


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("mkldnn", [True, False])
def test_recurrent_layers(cell, layers, bidirectional, mkldnn):
    gates, ways = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}[cell], 1 + bidirectional
    model = cell(10, 6, layers, bidirectional=bidirectional, batch_first=True)
    first, later = gates * 6 * (10 + 6), gates * 6 * (6 * ways + 6)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        assert macs(model, torch.randn(2, T, 10)) == 2 * T * ways * (first + (layers - 1) * later)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_projections():
    model = nn.LSTM(10, 6, proj_size=4, batch_first=True)
    assert macs(model, torch.randn(1, T, 10)) == T * (4 * 6 * (10 + 4) + 6 * 4)


def test_packed_sequences_count_their_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(10, 6, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
            return self.rnn(packed)[0].data

    assert macs(Net(), torch.randn(2, 5, 10)) == 8 * 4 * 6 * (10 + 6)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(cell):
    gates = {nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}[cell]
    assert macs(cell(10, 6), torch.randn(2, 10)) == 2 * gates * 6 * (10 + 6)


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand"),
    [
        (nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 5), 2 * 25 * 12 * 2 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 5, 5), 9 * 8 * 9),
        (nn.Conv1d(4, 6, 3, stride=2), (1, 4, 9), 4 * 6 * 4 * 3),
        (nn.Conv1d(4, 6, 3), (4, 9), 7 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4), 4 * 3 * 2 * 3 * 2 * 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 3 * 9),
        (nn.Linear(6, 3), (2, 5, 6), 10 * 18),
        (nn.Linear(6, 3, bias=False), (6,), 18),
        (nn.LazyLinear(3), (2, 6), 36),
        (nn.EmbeddingBag(5, 4), None, 0),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_layers(layer, shape, by_hand):
    x = torch.tensor([[0, 1], [2, 3]]) if shape is None else torch.randn(shape)
    layer(x)
    assert macs(layer, x) == by_hand


@pytest.mark.parametrize(
    ("function", "by_hand"),
    [
        (lambda x: F.bilinear(x[0], x[1], torch.ones(3, D, D)), T * 3 * D * D),
        (lambda x: F.linear(x, torch.ones(5, D)), 2 * T * D * 5),
        (lambda x: F.conv1d(x, torch.ones(3, T, 2)), 2 * (D - 1) * 3 * T * 2),
        (lambda x: torch.baddbmm(torch.ones(()), x, x.mT), 2 * T * T * D),
        (lambda x: torch.addbmm(torch.ones(()), x, x.mT), 2 * T * T * D),
        (lambda x: torch.addmm(torch.ones(()), x[0], x[1].T), T * T * D),
        (lambda x: x @ torch.ones(D), 2 * T * D),
        (lambda x: torch.addmv(torch.ones(T), x[0], torch.ones(D)), T * D),
        (lambda x: x[0, 0].dot(x[1, 0]), D),
        (lambda x: torch.einsum("btd,ed->bte", x, torch.ones(5, D)), 2 * T * D * 5),
        (lambda x: torch.tensordot(x, x, ([0, 1], [0, 1])), 2 * T * D * D),
        (
            lambda x: torch.vmap(lambda q: F.scaled_dot_product_attention(q, q, q))(x[:, None]),
            2 * 2 * T * T * D,
        ),
        (lambda x: x + 1, 0),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_functions(function, by_hand, inference):
    class Net(nn.Module):
        def forward(self, x):
            with torch.inference_mode(inference):
                return function(x)

    assert macs(Net(), torch.randn(2, T, D)) == by_hand


@pytest.mark.parametrize("name", ["grouped_mm", "_grouped_mm"])
def test_experts_in_one_product(name):
    product = getattr(torch, name, None) or getattr(F, name, None)
    if product is None:
        pytest.skip(f"this torch has no {name}")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 32, 16, dtype=torch.bfloat16))

        def forward(self, x):
            return product(x, self.up.mT, offs=torch.tensor([8, 8, 24], dtype=torch.int32))

    x = torch.randn(24, 16, dtype=torch.bfloat16)
    try:
        Net()(x)
    except RuntimeError as error:
        pytest.skip(f"{name} does not run here: {error}")
    [product_] = count(Net(), x)
    assert product_.macs == 24 * 16 * 32
    assert product_.makers == {("up", 1): 1, ("up", 2): 1}


def test_products_belong_to_the_innermost_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.twice = Attention(), nn.Linear(D, D)
            self.block = nn.Sequential(self.twice)  # the same layer by another name

        def forward(self, x):
            x = self.block(self.twice(self.attn(x)))
            outside = self.twice.forward(x) @ self.twice.weight  # outside of any layer's own call
            return F.linear(outside, self.twice.weight)

    found = {}
    for each in count(Net(), torch.randn(1, T, D)):
        found[each.path] = found.get(each.path, 0) + each.macs
    one = T * D * D
    assert found == {"attn.qkv": 3 * one, "attn": PRODUCTS, "attn.proj": one, "twice": 2 * one, "": 3 * one}


def test_learned_queries_go_straight_into_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(1, 5, D)), nn.Linear(D, 3)

        def forward(self, x):
            return self.layer(self.queries.expand(len(x), -1, -1))

    assert macs(Net(), torch.randn(2, 1)) == 2 * 5 * D * 3


def test_a_model_that_does_not_run_is_told():
    with pytest.raises(GraphError, match="does not run on its example inputs: RuntimeError: mat1"):
        measure(nn.Linear(3, 4), torch.randn(2, 5))
