//! config.json as NVIDIA's exporter (LLaMA: compared key by key) and TensorRT-LLM's converters (the others: read) write it.
use crate::checkpoint::trtllm::{ENCODER, Family, GATED_MLP, LAYER_NORM, MLP, NORM_FIRST, RMS_NORM};
use graphs::families::llama::Llama;
use graphs::families::mbart::{Mbart, Stack};
use graphs::families::opt::Opt;
use graphs::families::t5::T5;
use graphs::{ActivationKind, DType, Heads, RopeScaling};
use serde_json::{Value, json};

/// PyTorch's default for norms.
const EPSILON: f32 = 1e-5;

/// What decides the config.json of one folder.
pub(super) struct Settings<'s> {
    pub(super) family: Family<'s>,
    pub(super) folder: &'static str,
    pub(super) ranks: usize,
    pub(super) dtype: DType,
    pub(super) quantization: &'s Value,
}

impl Settings<'_> {
    /// `has` is whether a rank's file has a tensor; `own` the checkpoint's own config, for ids that the model does not hold.
    pub(super) fn config(&self, has: &dyn Fn(&str) -> bool, own: Option<&Value>) -> Value {
        let (head, rest) = match self.family {
            Family::Llama(llama) => ("LlamaForCausalLM", self.llama(llama, has)),
            Family::Opt(opt) => ("OPTForCausalLM", self.opt(opt, has)),
            Family::T5(t5) => (self.side(), self.t5(t5, own)),
            Family::Mbart(mbart) => (self.side(), self.mbart(mbart, has, own)),
        };
        let mut config = json!({
            "producer": { "name": "trtvlm", "version": env!("CARGO_PKG_VERSION") },
            "architecture": head,
            "dtype": self.dtype,
            "logits_dtype": if self.dtype == DType::Float32 { DType::Float32 } else { DType::Float16 },
        });
        join(&mut config, rest);
        join(
            &mut config,
            json!({
                "mapping": { "world_size": self.ranks, "tp_size": self.ranks, "pp_size": 1 },
                "quantization": self.quantization,
            }),
        );
        config
    }

    fn side(&self) -> &'static str {
        if self.folder == ENCODER { "EncoderModel" } else { "DecoderModel" }
    }

    fn llama(&self, llama: &Llama, has: &dyn Fn(&str) -> bool) -> Value {
        let mut config = json!({
            "num_hidden_layers": llama.layers,
            "num_attention_heads": llama.heads.query,
            "num_key_value_heads": llama.heads.key_value,
            "hidden_size": llama.hidden,
            "norm_epsilon": decimal(llama.epsilon),
            "vocab_size": llama.vocab,
            "max_position_embeddings": llama.max_positions,
            "hidden_act": activation(llama.activation),
            "use_parallel_embedding": true,
            "embedding_sharding_dim": 0,
            "head_size": llama.heads.dim,
            "intermediate_size": llama.ffn,
            "position_embedding_type": "rope_gpt_neox",
            "share_embedding_table": !has("lm_head.weight"),
            "residual_mlp": false,
            "bias": llama.attention_bias,
            "rotary_pct": 1.0,
            "rank": self.ranks - 1,
            "decoder": "llama",
            "rmsnorm": true,
            "lm_head_bias": false,
            "rotary_base": decimal(llama.rope.theta),
        });
        let scaling = match llama.rope.scaling {
            None => return config,
            Some(RopeScaling::Linear { factor }) => json!({ "type": "linear", "factor": decimal(factor) }),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }) => json!({
                "type": "llama3", "rope_type": "llama3", "factor": decimal(factor),
                "low_freq_factor": decimal(low_freq_factor), "high_freq_factor": decimal(high_freq_factor),
                "original_max_position_embeddings": decimal(original_max_positions),
            }),
        };
        join(&mut config, json!({ "rotary_scaling": scaling }));
        config
    }

    fn opt(&self, opt: &Opt, has: &dyn Fn(&str) -> bool) -> Value {
        json!({
            "num_hidden_layers": opt.layers,
            "num_attention_heads": opt.heads.query,
            "num_key_value_heads": opt.heads.key_value,
            "hidden_size": opt.hidden,
            "norm_epsilon": decimal(EPSILON),
            "vocab_size": opt.vocab,
            "max_position_embeddings": opt.max_positions,
            "hidden_act": activation(opt.activation),
            "use_parallel_embedding": true,
            "embedding_sharding_dim": 0,
            "intermediate_size": opt.ffn,
            "position_embedding_type": "learned_absolute",
            "share_embedding_table": !has("lm_head.weight"),
            "do_layer_norm_before": opt.norm_first,
        })
    }

    /// What an encoder and a decoder have in common.
    fn stack(&self, layers: usize, heads: Heads, sizes: [usize; 3], epsilon: f32, kind: ActivationKind) -> Value {
        let [hidden, ffn, vocab] = sizes;
        json!({
            "num_hidden_layers": layers,
            "num_attention_heads": heads.query,
            "num_key_value_heads": heads.key_value,
            "head_size": heads.dim,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "vocab_size": vocab,
            "norm_epsilon": decimal(epsilon),
            "hidden_act": activation(kind),
            "use_parallel_embedding": false,
            "embedding_sharding_dim": 0,
            "share_embedding_table": false,
            "use_prompt_tuning": false,
            "has_model_final_layernorm": true,
            "layernorm_position": NORM_FIRST,
        })
    }

    /// What a decoder is told of its encoder, and the ids of its own tokens.
    fn decoder(&self, hidden: usize, encoder: Heads, start: usize, own: Option<&Value>) -> Value {
        let id = |key: &str| {
            let own = own?;
            own.get(key).or_else(|| own.get("text_config")?.get(key)).cloned()
        };
        json!({
            "encoder_hidden_size": hidden,
            "encoder_num_heads": encoder.query,
            "encoder_head_size": encoder.dim,
            "skip_cross_qkv": false,
            "decoder_start_token_id": start,
            "eos_token_id": id("eos_token_id"),
            "bos_token_id": id("bos_token_id"),
            "pad_token_id": id("pad_token_id"),
        })
    }

    fn t5(&self, t5: &T5, own: Option<&Value>) -> Value {
        let encoder = self.folder == ENCODER;
        let layers = if encoder { t5.encoder_layers } else { t5.layers };
        let mut config = self.stack(layers, t5.heads, [t5.hidden, t5.ffn, t5.vocab], t5.epsilon, t5.activation);
        join(
            &mut config,
            json!({
                "position_embedding_type": "relative",
                // Distances have no end; TensorRT-LLM wants one all the same.
                "max_position_embeddings": 512,
                "has_position_embedding": false,
                "layernorm_type": RMS_NORM,
                "has_attention_qkvo_bias": false,
                "has_mlp_bias": false,
                "has_embedding_layernorm": false,
                "has_embedding_scale": false,
                // Takes the scaling of attention back.
                "q_scaling": 1.0 / (t5.heads.dim as f64).sqrt(),
                "mlp_type": if t5.gated { GATED_MLP } else { MLP },
                "gated_act": t5.gated,
                "relative_attention": true,
                "max_distance": t5.max_distance,
                "num_buckets": t5.buckets,
                "model_type": "t5",
            }),
        );
        if !encoder {
            join(&mut config, json!({ "rescale_before_lm_head": t5.scaled_head }));
            join(&mut config, self.decoder(t5.hidden, t5.heads, t5.start_id, own));
        }
        config
    }

    fn mbart(&self, mbart: &Mbart, has: &dyn Fn(&str) -> bool, own: Option<&Value>) -> Value {
        let text = mbart.encoder.as_ref().unwrap_or(&mbart.stack);
        let encoder = self.folder == ENCODER;
        let Stack { layers, ffn, heads } = if encoder { text } else { &mbart.stack };
        let mut config = self.stack(*layers, *heads, [mbart.hidden, *ffn, mbart.vocab], EPSILON, mbart.activation);
        join(
            &mut config,
            json!({
                "position_embedding_type": "learned_absolute",
                "max_position_embeddings": mbart.max_positions,
                "has_position_embedding": true,
                "layernorm_type": LAYER_NORM,
                "has_attention_qkvo_bias": true,
                "has_mlp_bias": true,
                "has_embedding_layernorm": true,
                "has_embedding_scale": mbart.scaled_embedding,
                "q_scaling": 1.0,
                "mlp_type": MLP,
                "gated_act": false,
                "relative_attention": false,
                "max_distance": 0,
                "num_buckets": 0,
                "model_type": "bart",
            }),
        );
        if !encoder {
            join(&mut config, json!({ "rescale_before_lm_head": false, "lm_head_bias": has("lm_head.bias") }));
            join(&mut config, self.decoder(mbart.hidden, text.heads, mbart.start_id, own));
        }
        config
    }
}

fn join(config: &mut Value, more: Value) {
    if let (Value::Object(config), Value::Object(more)) = (config, more) {
        config.extend(more);
    }
}

/// The number that is written with the fewest digits, not the one that binary fractions make of it.
fn decimal(number: f32) -> Value {
    json!(number.to_string().parse::<f64>().unwrap_or(number.into()))
}

fn activation(kind: ActivationKind) -> &'static str {
    match kind {
        ActivationKind::Relu => "relu",
        ActivationKind::Silu => "silu",
        ActivationKind::Gelu => "gelu",
        ActivationKind::GeluTanh => "gelu_new",
        ActivationKind::QuickGelu => "quick_gelu",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_come_back() {
        for number in [1e-5f32, 1e-6, 10000.0, 500000.0, 8.0, 1.1] {
            assert_eq!(decimal(number).as_f64().unwrap() as f32, number);
        }
        assert_eq!(decimal(1e-5), json!(1e-5));
        for name in ["relu", "silu", "gelu", "gelu_new", "quick_gelu"] {
            assert_eq!(activation(ActivationKind::from_config(name).unwrap()), name);
        }
    }
}
