"""Models that people use, in tiny random configurations.

From transformers, with nothing downloaded: their layers are nested and named
as their authors liked, their outputs are objects, and their checkpoints have
other users.
"""

import copy
import socket

import pytest
import torch
from torch import nn

import normlib
from normlib import convert, inference
from normlib.modules import BATCH_NORMS
from normlib.testing import assert_close


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def library():
    """Transformers: seconds to import, for those tests only that need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        yield transformers


def drawn(model, seed=1):
    """The model with no parameter or statistic at 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=g)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.3, generator=g)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=g)
                module.running_var.uniform_(0.5, 1.5, generator=g)
    return model


def resnet(library, layer_type="basic"):
    torch.manual_seed(0)
    config = library.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type=layer_type,
        num_labels=3,
    )
    return drawn(library.ResNetForImageClassification(config).double())


def bert(library):
    torch.manual_seed(0)
    config = library.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return drawn(library.BertForSequenceClassification(config).double())


def llama(library):
    torch.manual_seed(0)
    config = library.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return drawn(library.LlamaForCausalLM(config))


def llama_rule(name, module):
    """Llama's own layer, by its name, with the weight it has."""
    if type(module).__name__ != "LlamaRMSNorm":
        return None
    norm = normlib.RMSNorm(module.weight.shape, module.variance_epsilon)
    norm.weight = module.weight
    return norm


def convert_llama(model):
    return convert.replace_modules(model, llama_rule)


MODELS = {
    "resnet, basic": (resnet, convert.from_torch, 8),
    "resnet, bottleneck": (
        lambda library: resnet(library, "bottleneck"),
        convert.from_torch,
        11,
    ),
    "bert": (bert, convert.from_torch, 5),
    "llama": (llama, convert_llama, 5),
}


@pytest.fixture(params=MODELS)
def pair(request, library):
    """A model, and the same one converted."""
    make, there, count = MODELS[request.param]
    theirs = make(library)
    ours = there(copy.deepcopy(theirs))
    norms = [m for m in ours.modules() if "Norm" in type(m).__name__]
    assert len(norms) == count
    assert {type(m).__module__ for m in norms} == {"normlib.modules"}
    with normlib.use_backend("eager"):
        yield theirs, ours


def images(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float64)


def inputs(model, seed=0):
    """What the model takes, with labels."""
    g = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images(6, seed), "labels": torch.arange(6) % 3}
    tokens = torch.randint(50, (3, 7), generator=g)
    causal = "Causal" in type(model).__name__
    labels = tokens if causal else torch.arange(3) % 2
    return {"input_ids": tokens, "labels": labels}


# Conversion.


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_the_same(pair, training):
    theirs, ours = (model.train(training) for model in pair)
    batch = inputs(theirs)
    assert_close(ours(**batch).logits, theirs(**batch).logits)


def test_training_is_the_same(pair):
    for model in pair:
        model.train()
        sgd = torch.optim.SGD(model.parameters(), 0.05)
        for seed in range(3):
            sgd.zero_grad()
            model(**inputs(model, seed)).loss.backward()
            sgd.step()
    theirs, ours = (model.state_dict() for model in pair)
    assert list(ours) == list(theirs)
    assert_close(list(ours.values()), list(theirs.values()))


def test_checkpoints_fit_both_ways(pair, tmp_path):
    theirs, ours = pair
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path).to(theirs.dtype).eval()
    batch = inputs(theirs)
    assert_close(again(**batch).logits, theirs.eval()(**batch).logits)


def test_back_in_torch_it_is_what_it_was(library):
    before, model = resnet(library), resnet(library)
    convert.to_torch(convert.from_torch(model))
    assert repr(model) == repr(before)
    assert torch.equal(model(images()).logits, before(images()).logits)


def test_from_torch_leaves_llamas_own_layers(library):
    model = llama(library)
    before = [type(module) for module in model.modules()]
    convert.from_torch(model)
    assert [type(module) for module in model.modules()] == before


def test_a_converted_llama_generates_the_same_text(library):
    theirs = llama(library).eval()
    ours = convert_llama(copy.deepcopy(theirs))
    tokens = inputs(theirs)["input_ids"]
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = ours.generate(tokens, **kwargs)
    assert torch.equal(written, theirs.generate(tokens, **kwargs))


def test_group_norm_frees_a_resnet_of_its_batch(library):
    model, x = resnet(library), images()
    model.train()
    assert not torch.allclose(model(x[:2]).logits, model(x).logits[:2])
    convert.batch_norm_to_group_norm(model, lambda channels: channels // 4)
    assert not any(isinstance(m, BATCH_NORMS) for m in model.modules())
    assert_close(model(x[:1]).logits, model(x).logits[:1])
    model(x, labels=torch.arange(6) % 3).loss.backward()
    assert all(p.grad.any() for p in model.parameters())


# Test time, with torch's layers and with ours.


@pytest.fixture(params=["torch", "normlib"])
def image_model(request, library):
    """A ResNet in evaluation mode, as it came or converted."""
    model = resnet(library, "bottleneck").eval()
    return convert.from_torch(model) if request.param == "normlib" else model


def trained_once(model, x):
    """The statistics of one batch, as training would store them."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)
    return model.eval()


def test_statistics_of_one_batch_are_those_of_training(image_model):
    x = images()
    expected = trained_once(image_model, x)(x).logits
    before = image_model(x).logits
    inference.recalibrate_batch_norm(image_model, [x])
    assert not image_model.training
    assert_close(image_model(x).logits, expected)
    assert (before - expected).abs().max() > 0.01


def test_the_order_of_the_batches_does_not_matter(image_model):
    """Of dictionaries too, which is how these models are fed."""
    batches = [images(n, seed) for seed, n in enumerate((4, 1, 6))]
    other = copy.deepcopy(image_model)
    inference.recalibrate_batch_norm(image_model, batches)
    named = [{"pixel_values": x} for x in batches[::-1]]
    inference.recalibrate_batch_norm(other, named)
    stem = [
        next(n for n in m.modules() if isinstance(n, BATCH_NORMS))
        for m in (image_model, other)
    ]
    assert_close(stem[0].running_var, stem[1].running_var)
    assert_close(stem[0].running_mean, stem[1].running_mean)


def test_frozen_it_trains_in_evaluation(image_model):
    x = images()
    expected = image_model(x).logits
    keys = list(image_model.state_dict())
    inference.freeze_batch_norm(image_model)
    assert list(image_model.state_dict()) == keys
    image_model.train()
    out = image_model(x, labels=torch.arange(6) % 3)
    assert_close(out.logits, expected)
    out.loss.backward()
    assert_close(image_model(x).logits, expected)


def test_adapted_it_uses_the_test_batch(image_model):
    x = images()
    before = image_model(x).logits
    expected = copy.deepcopy(image_model).train()(x).logits
    with inference.adapt_batch_norm(image_model):
        assert_close(image_model(x).logits, expected)
    assert torch.equal(image_model(x).logits, before)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "normlib"])
def test_every_batch_norm_of_a_resnet_is_folded(library, layer_type, ours):
    model = resnet(library, layer_type).eval()
    if ours:
        convert.from_torch(model)
    folded = inference.fold_batch_norm(model)
    assert not any(isinstance(m, BATCH_NORMS) for m in folded.modules())
    x = images()
    assert_close(folded(x).logits, model(x).logits, tolerance=1e-10)


def test_recalibrated_frozen_and_folded_in_a_row(image_model):
    x = images()
    inference.recalibrate_batch_norm(image_model, [x])
    expected = image_model(x).logits
    inference.freeze_batch_norm(image_model)
    assert_close(image_model(x).logits, expected)
    folded = inference.fold_batch_norm(image_model)
    assert_close(folded(x).logits, expected, tolerance=1e-10)
