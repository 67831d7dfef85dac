"""Transformers' tables of class names, and the tools that look in them."""

import logging

import pytest
import transformers
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoConfig, pipeline
from transformers.models.auto import modeling_auto

import mhmoe
from mhmoe.modeling_mhmoe.auto_tables import TABLES


def test_tables_hold_the_classes_of_the_package():
    names = {name for name in mhmoe.__all__ if name.startswith(("MHMoEFor", "MHMoEModel"))}
    assert set(TABLES.values()) == names
    for table, name in TABLES.items():
        assert getattr(modeling_auto, table)["mhmoe"] == name
        assert getattr(transformers, name) is getattr(mhmoe, name)


def test_auto_classes_still_find_the_registered_ones():
    """The tables are read by the Auto classes too, which import what is in them from transformers.models."""
    for name in dir(modeling_auto):
        if name.endswith("_MAPPING"):
            list(getattr(modeling_auto, name).keys())
    assert type(AutoConfig.for_model("mhmoe")) is mhmoe.MHMoEConfig
    assert type(transformers.AutoModelForCausalLM.from_config(tiny_config())) is mhmoe.MHMoEForCausalLM


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-generation", mhmoe.MHMoEForCausalLM),
        ("text-classification", mhmoe.MHMoEForSequenceClassification),
        ("token-classification", mhmoe.MHMoEForTokenClassification),
    ],
)
def test_pipelines_do_not_call_the_model_unsupported(task, head, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pipe = pipeline(task, model=head(tiny_config()), tokenizer=tiny_tokenizer(), device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert pipe("a cat")


def test_lm_eval_knows_a_causal_model():
    from lm_eval.models.huggingface import HFLM

    assert HFLM(tiny_model(), tokenizer=tiny_tokenizer(), backend="default", device="cpu").backend == "causal"
