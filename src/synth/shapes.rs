//! Shapes of models on the hub, each the contents of its config.json.
use super::SynthError;
use crate::checkpoint::nearest;
use serde_json::Value;
use std::cmp::Reverse;
use std::path::{Path, PathBuf};

/// Name, and config.json as on the hub.
const SHAPES: [(&str, &str); 10] = [
    // llava-hf/llava-1.5-7b-hf
    (
        "llava-1.5-7b",
        r#"{
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32000,
            "model_type": "llava",
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064
            },
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064
        }"#,
    ),
    // llava-hf/llava-1.5-13b-hf
    (
        "llava-1.5-13b",
        r#"{
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32000,
            "model_type": "llava",
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-13b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "num_attention_heads": 40,
                "num_hidden_layers": 40,
                "num_key_value_heads": 40,
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064
            },
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064
        }"#,
    ),
    // Efficient-Large-Model/VILA1.5-3b, put together from its parts: Sheared-LLaMA-2.7B, siglip-so400m-patch14-384
    (
        "vila1.5-3b",
        r#"{
            "architectures": ["LlavaLlamaModel"],
            "hidden_size": 2560,
            "image_aspect_ratio": "resize",
            "llm_cfg": {
                "architectures": ["LlamaForCausalLM"],
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_act": "silu",
                "hidden_size": 2560,
                "intermediate_size": 6912,
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "num_attention_heads": 20,
                "num_hidden_layers": 32,
                "num_key_value_heads": 20,
                "pad_token_id": 0,
                "rms_norm_eps": 1e-05,
                "rope_scaling": null,
                "tie_word_embeddings": false,
                "torch_dtype": "bfloat16",
                "vocab_size": 32000
            },
            "mm_hidden_size": 1152,
            "mm_projector_cfg": {
                "architectures": ["MultimodalProjector"],
                "mm_projector_type": "mlp_downsample",
                "model_type": "v2l_projector",
                "torch_dtype": "bfloat16"
            },
            "mm_use_im_patch_token": false,
            "mm_use_im_start_end": false,
            "mm_vision_select_feature": "cls_patch",
            "mm_vision_select_layer": -2,
            "model_dtype": "torch.bfloat16",
            "model_type": "llava_llama",
            "s2": false,
            "tokenizer_model_max_length": 4096,
            "vision_tower_cfg": {
                "architectures": ["SiglipVisionModel"],
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "layer_norm_eps": 1e-06,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_channels": 3,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "torch_dtype": "bfloat16"
            }
        }"#,
    ),
    // meta-llama/Llama-2-7b-hf
    (
        "llama-2-7b",
        r#"{
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": null,
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
            "use_cache": true,
            "vocab_size": 32000
        }"#,
    ),
    // meta-llama/Llama-2-13b-hf
    (
        "llama-2-13b",
        r#"{
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 13824,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": null,
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "transformers_version": "4.32.0.dev0",
            "use_cache": true,
            "vocab_size": 32000
        }"#,
    ),
    // meta-llama/Llama-3.1-8B
    (
        "llama-3.1-8b",
        r#"{
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3"
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "use_cache": true,
            "vocab_size": 128256
        }"#,
    ),
    // TinyLlama/TinyLlama-1.1B-Chat-v1.0
    (
        "tinyllama-1.1b",
        r#"{
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": null,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.35.0",
            "use_cache": true,
            "vocab_size": 32000
        }"#,
    ),
    // HuggingFaceTB/SmolLM2-135M
    (
        "smollm2-135m",
        r#"{
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": true,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": false,
            "rope_scaling": null,
            "rope_theta": 100000,
            "tie_word_embeddings": true,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": true,
            "vocab_size": 49152
        }"#,
    ),
    // facebook/opt-2.7b
    (
        "opt-2.7b",
        r#"{
            "_remove_final_layer_norm": false,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "bos_token_id": 2,
            "do_layer_norm_before": true,
            "eos_token_id": 2,
            "ffn_dim": 10240,
            "hidden_size": 2560,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pad_token_id": 1,
            "prefix": "</s>",
            "torch_dtype": "float16",
            "vocab_size": 50272,
            "word_embed_proj_dim": 2560
        }"#,
    ),
    // Salesforce/blip2-opt-2.7b
    (
        "blip2-opt-2.7b",
        r#"{
            "architectures": ["Blip2ForConditionalGeneration"],
            "image_text_hidden_size": 256,
            "image_token_index": 50265,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "model_type": "blip-2",
            "num_query_tokens": 32,
            "qformer_config": {
                "classifier_dropout": null,
                "model_type": "blip_2_qformer"
            },
            "text_config": {
                "_name_or_path": "facebook/opt-2.7b",
                "activation_dropout": 0.0,
                "architectures": ["OPTForCausalLM"],
                "eos_token_id": 50118,
                "ffn_dim": 10240,
                "hidden_size": 2560,
                "model_type": "opt",
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "prefix": "</s>",
                "torch_dtype": "float16",
                "vocab_size": 50304,
                "word_embed_proj_dim": 2560
            },
            "torch_dtype": "float32",
            "transformers_version": "4.47.0.dev0",
            "use_decoder_only_language_model": true,
            "vision_config": {
                "dropout": 0.0,
                "initializer_factor": 1.0,
                "model_type": "blip_2_vision_model",
                "num_channels": 3,
                "projection_dim": 512
            }
        }"#,
    ),
];

/// The config of a known shape, of a config.json, or of the folder of one. A known name wins over a path, as runs leave
/// folders of that name behind; `./NAME` is the path.
///
/// # Errors
/// A name that is neither, with the known ones; a file that is unreadable or no JSON.
pub fn find(name: &str) -> Result<Value, SynthError> {
    if let Some((_, config)) = SHAPES.iter().find(|(known, _)| *known == name) {
        return parse(Path::new(name), config.as_bytes());
    }
    let path = PathBuf::from(name);
    let path = match path.is_dir() {
        true => path.join("config.json"),
        false if path.exists() => path,
        false => return Err(SynthError::Unknown { name: name.to_owned(), known: by_likeness(name) }),
    };
    let content = std::fs::read(&path).map_err(|source| SynthError::Read { path: path.clone(), source })?;
    parse(&path, &content)
}

fn parse(path: &Path, content: &[u8]) -> Result<Value, SynthError> {
    serde_json::from_slice(content).map_err(|source| SynthError::Json { path: path.to_owned(), source })
}

/// The known names, those first that are most like `name`: by a slip of the hand, then by how they start.
fn by_likeness(name: &str) -> Vec<&'static str> {
    let name = name.to_ascii_lowercase();
    let mut known: Vec<&'static str> = SHAPES.iter().map(|(known, _)| *known).collect();
    let slip = nearest(&name, known.iter().copied());
    let start = |known: &str| std::iter::zip(known.bytes(), name.bytes()).take_while(|(a, b)| a == b).count();
    known.sort_by_key(|known| (Some(*known) != slip, Reverse(start(known))));
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::{DType, Logits, Model, Network};

    /// Values in millions, as the models' cards have them; LLaVA's without the last vision block and the norm behind it,
    /// which never run.
    #[test]
    fn every_shape_has_the_size_that_its_card_names() {
        let millions = |name: &str| {
            let networks =
                Model::from_config(&find(name).unwrap()).unwrap().networks(DType::Float16, Logits::Last).unwrap();
            let mut tensors: Vec<(&str, &[usize])> =
                networks.iter().flat_map(Network::weights).flat_map(|(_, weight)| weight.tensors()).collect();
            tensors.sort_unstable();
            tensors.dedup();
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>() / 1_000_000
        };
        let found = SHAPES.map(|(name, _)| (name, millions(name)));
        let wanted = [
            ("llava-1.5-7b", 7063 - 13),
            ("llava-1.5-13b", 13_351 - 13),
            // Sheared-LLaMA 2701.6, SigLIP 428.2 without its last block and head of 15.2 each, the projector 18.4.
            ("vila1.5-3b", 3117),
            ("llama-2-7b", 6738),
            ("llama-2-13b", 13_015),
            ("llama-3.1-8b", 8030),
            ("tinyllama-1.1b", 1100),
            ("smollm2-135m", 134),
            ("opt-2.7b", 2651),
            ("blip2-opt-2.7b", 3744),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_wrong_name_lists_the_likely_ones_first() {
        let known = |name: &str| match find(name) {
            Err(SynthError::Unknown { known, .. }) => known,
            other => panic!("{other:?}"),
        };
        assert_eq!(known("lava-1.5-13b")[0], "llava-1.5-13b");
        assert_eq!(known("Llama-3-8B-Instruct")[0], "llama-3.1-8b");
        assert_eq!(known("gpt-2").len(), SHAPES.len());
    }
}
