"""What of transformers' tests is not run, and why; what is skipped for MH-MoE but not for Mixtral, and why."""

USED_FILES = {
    "test_configuration_common.py",
    "test_executorch.py",
    "test_expert_parallel_mixin.py",
    "test_fsdp_mixin.py",
    "test_modeling_common.py",
    "test_tensor_parallel_mixin.py",
    "test_training_mixin.py",
}

LEFT_OUT_FILES = {
    "test_backbone_common.py": "vision backbones",
    "test_decision_head_common.py": "decision heads, from files on the Hub",
    "test_feature_extraction_common.py": "feature extractors",
    "test_image_processing_common.py": "image processors",
    "test_image_transforms.py": "image processing, no model",
    "test_memory_cleanup_mixin.py": "no cases: frees accelerator memory between integration tests",
    "test_monkey_patching.py": "the library's patching of classes, no model",
    "test_pipeline_mixin.py": "its cases are in tests/pipelines, not in the sdist, and load tiny models from the Hub",
    "test_processing_common.py": "processors of multimodal models",
    "test_sentencepiece_backend_mixin.py": "tokenizers",
    "test_sequence_feature_extraction_common.py": "feature extractors",
    "test_tokenization_common.py": "tokenizers",
    "test_tokenization_mistral_common.py": "tokenizers",
    "test_tokenizers_backend_mixin.py": "tokenizers",
    "test_video_processing_common.py": "video processors",
    "generation/test_utils.py (GenerationTesterMixin)": "not in the sdist",
    "exporters/test_export.py (ExportTesterMixin)": "not in the sdist",
}

LEFT_OUT_CASES = {
    "test_generation_tester_mixin_inheritance": "asks for GenerationTesterMixin, which the sdist does not carry",
}

SKIPPED_BUT_NOT_FOR_MIXTRAL = dict.fromkeys(
    ("test_reverse_loading_mapping", "test_can_load_from_already_mapped_keys"),
    "Mixtral's checkpoints are converted on loading; MH-MoE's hold the tensors as the modules do",
)
