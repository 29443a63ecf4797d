//! config.json of TensorRT-LLM, and the config of Hugging Face that says the same.
use super::fault::RankFault;
use super::layout::Split;
use serde_json::{Map, Value, json};

/// More ranks than any machine has.
const MOST_RANKS: usize = 1024;
/// TensorRT-LLM's numbers for them (`LayerNormType`, `LayerNormPositionType`, `MLPType`).
pub(crate) const RMS_NORM: u64 = 1;
pub(crate) const LAYER_NORM: u64 = 0;
pub(crate) const NORM_FIRST: u64 = 0;
pub(crate) const GATED_MLP: u64 = 1;
pub(crate) const MLP: u64 = 0;

/// One config.json.
pub(super) struct Settings {
    pub(super) object: Map<String, Value>,
}

impl Settings {
    /// The value of a path of keys joined by dots.
    fn get(&self, path: &str) -> Option<&Value> {
        let mut keys = path.split('.');
        let first = self.object.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.get(key)).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, wanted: impl Into<String>) -> RankFault {
        let Some(found) = self.get(key) else { return RankFault::MissingKey { key: key.into() } };
        let found: String = found.as_str().map_or_else(|| found.to_string(), str::to_owned).chars().take(200).collect();
        RankFault::Key { key: key.into(), found, wanted: wanted.into() }
    }

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize, RankFault> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (found, _) => {
                let size = found.and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
                size.filter(|size| *size > 0).ok_or_else(|| self.wrong(key, "a whole number above 0"))
            }
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, RankFault> {
        let Some(found) = self.get(key) else { return Ok(default) };
        found.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// Refuses a key that is there with another value.
    fn only(&self, key: &str, allowed: &[Value]) -> Result<(), RankFault> {
        match self.get(key) {
            Some(found) if !allowed.contains(found) => {
                let wanted: Vec<String> = allowed.iter().map(|value| format!("`{}`", plain(value))).collect();
                Err(self.wrong(key, wanted.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// Ranks of tensor parallelism.
    pub(super) fn ranks(&self) -> Result<usize, RankFault> {
        let tp = self.size("mapping.tp_size", Some(1))?;
        let pp = self.size("mapping.pp_size", Some(1))?;
        if tp > MOST_RANKS {
            return Err(self.wrong("mapping.tp_size", format!("at most {MOST_RANKS}")));
        }
        if pp > 1 {
            return Err(RankFault::Pipeline { found: pp });
        }
        self.only("mapping.cp_size", &[json!(1)])?;
        match self.size("mapping.world_size", Some(tp))? {
            world if world == tp => Ok(tp),
            found => Err(RankFault::World { found, wanted: tp }),
        }
    }

    /// How ranks share the embedding.
    pub(super) fn embedding(&self) -> Result<Split, RankFault> {
        if !self.flag("use_parallel_embedding", false)? {
            return Ok(Split::Whole);
        }
        match self.get("embedding_sharding_dim").map(Value::as_u64) {
            None | Some(Some(0)) => Ok(Split::Words),
            Some(Some(1)) => Ok(Split::Columns),
            Some(_) => Err(self.wrong("embedding_sharding_dim", "0 or 1")),
        }
    }

    /// Whether matrices hold two integers in a byte.
    pub(super) fn is_int4(&self) -> bool {
        self.text("quantization.quant_algo").is_some_and(|algorithm| algorithm.starts_with("W4"))
    }

    /// What every architecture here lacks.
    fn check_common(&self) -> Result<(), RankFault> {
        self.only("residual_mlp", &[json!(false)])?;
        self.only("moe.num_experts", &[json!(0)])?;
        self.only("lm_head_bias", &[json!(false), json!(true)])?;
        self.only("quantization.use_weight_only", &[json!(false)])
    }

    /// Hugging Face's config of a decoder-only model; `has` is whether rank 0 has a tensor.
    pub(super) fn decoder_only(&self, has: &dyn Fn(&str) -> bool) -> Result<Map<String, Value>, RankFault> {
        self.check_common()?;
        let architecture = self.text("architecture").unwrap_or_default();
        let (hidden, heads) = (self.size("hidden_size", None)?, self.size("num_attention_heads", None)?);
        let mut config = json!({
            "architectures": [architecture],
            "vocab_size": self.size("vocab_size", None)?,
            "hidden_size": hidden,
            "num_hidden_layers": self.size("num_hidden_layers", None)?,
            "num_attention_heads": heads,
            "max_position_embeddings": self.size("max_position_embeddings", None)?,
            "torch_dtype": self.get("dtype"),
            "tie_word_embeddings": !has("lm_head.weight"),
        });
        let ffn = self.size("intermediate_size", Some(hidden.saturating_mul(4)))?;
        let activation = self.get("hidden_act").cloned();
        let layer = "transformer.layers.0";
        match architecture {
            "LlamaForCausalLM" => {
                self.only("position_embedding_type", &[json!("rope_gpt_neox")])?;
                self.only("rotary_pct", &[json!(1.0), json!(1)])?;
                config["model_type"] = json!("llama");
                config["intermediate_size"] = json!(ffn);
                config["num_key_value_heads"] = json!(self.size("num_key_value_heads", Some(heads))?);
                config["head_dim"] = json!(self.size("head_size", Some((hidden / heads).max(1)))?);
                config["hidden_act"] = json!(activation);
                config["rms_norm_eps"] = json!(self.get("norm_epsilon").cloned().unwrap_or(json!(1e-5)));
                config["rope_theta"] = json!(self.get("rotary_base"));
                config["rope_scaling"] = json!(self.get("rotary_scaling"));
                config["attention_bias"] = json!(has(&format!("{layer}.attention.dense.bias")));
                config["mlp_bias"] = json!(has(&format!("{layer}.mlp.proj.bias")));
            }
            "OPTForCausalLM" => {
                self.only("position_embedding_type", &[json!("learned_absolute")])?;
                self.only("num_key_value_heads", &[json!(heads)])?;
                config["model_type"] = json!("opt");
                config["ffn_dim"] = json!(ffn);
                config["activation_function"] = json!(activation);
                config["do_layer_norm_before"] = json!(self.flag("do_layer_norm_before", true)?);
                config["_remove_final_layer_norm"] = json!(!has("transformer.ln_f.weight"));
                config["enable_bias"] = json!(has(&format!("{layer}.mlp.proj.bias")));
            }
            _ => return Err(self.wrong("architecture", "`LlamaForCausalLM` or `OPTForCausalLM`")),
        }
        Ok(into_object(config))
    }
}

/// Hugging Face's config of a model in two folders; this is the decoder's.
pub(super) fn encoder_decoder(encoder: &Settings, decoder: &Settings) -> Result<Map<String, Value>, RankFault> {
    for (settings, wanted) in [(encoder, "EncoderModel"), (decoder, "DecoderModel")] {
        settings.check_common()?;
        if settings.text("architecture") != Some(wanted) {
            return Err(settings.wrong("architecture", format!("`{wanted}`")));
        }
        settings.only("layernorm_position", &[json!(NORM_FIRST)])?;
        settings.only("has_model_final_layernorm", &[json!(true)])?;
    }
    let same = [
        "hidden_size",
        "vocab_size",
        "dtype",
        "hidden_act",
        "norm_epsilon",
        "position_embedding_type",
        "has_embedding_scale",
        "mapping",
        "quantization",
        "use_parallel_embedding",
        "embedding_sharding_dim",
    ];
    check_same(encoder, decoder, &same)?;
    let relative = decoder.text("position_embedding_type") == Some("relative");
    if relative {
        check_same(encoder, decoder, &["num_attention_heads", "head_size", "ffn_hidden_size", "mlp_type"])?;
        check_same(encoder, decoder, &["num_buckets", "max_distance"])?;
    }
    let config = if relative { t5(encoder, decoder)? } else { mbart(encoder, decoder)? };
    Ok(into_object(config))
}

fn t5(encoder: &Settings, decoder: &Settings) -> Result<Value, RankFault> {
    for settings in [encoder, decoder] {
        settings.only("layernorm_type", &[json!(RMS_NORM)])?;
        settings.only("mlp_type", &[json!(MLP), json!(GATED_MLP)])?;
    }
    let gated = decoder.get("mlp_type") == Some(&json!(GATED_MLP));
    let activation = decoder.text("hidden_act").ok_or_else(|| decoder.wrong("hidden_act", "a text"))?;
    let heads = decoder.size("num_attention_heads", None)?;
    let hidden = decoder.size("hidden_size", None)?;
    Ok(json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
        "vocab_size": decoder.size("vocab_size", None)?,
        "d_model": hidden,
        "d_kv": decoder.size("head_size", Some((hidden / heads).max(1)))?,
        "d_ff": decoder.size("ffn_hidden_size", None)?,
        "num_heads": heads,
        "num_layers": encoder.size("num_hidden_layers", None)?,
        "num_decoder_layers": decoder.size("num_hidden_layers", None)?,
        "layer_norm_epsilon": decoder.get("norm_epsilon"),
        "feed_forward_proj": if gated { format!("gated-{activation}") } else { activation.to_owned() },
        "relative_attention_num_buckets": decoder.size("num_buckets", None)?,
        "relative_attention_max_distance": decoder.size("max_distance", None)?,
        "tie_word_embeddings": decoder.flag("rescale_before_lm_head", false)?,
        "decoder_start_token_id": decoder.get("decoder_start_token_id"),
        "torch_dtype": decoder.get("dtype"),
    }))
}

fn mbart(encoder: &Settings, decoder: &Settings) -> Result<Value, RankFault> {
    check_same(encoder, decoder, &["max_position_embeddings"])?;
    for settings in [encoder, decoder] {
        settings.only("position_embedding_type", &[json!("learned_absolute"), json!("relative")])?;
        settings.only("layernorm_type", &[json!(LAYER_NORM)])?;
        settings.only("mlp_type", &[json!(MLP)])?;
        settings.only("has_embedding_layernorm", &[json!(true)])?;
    }
    Ok(json!({
        "architectures": ["MBartForConditionalGeneration"], "model_type": "mbart",
        "vocab_size": decoder.size("vocab_size", None)?,
        "d_model": decoder.size("hidden_size", None)?,
        "encoder_layers": encoder.size("num_hidden_layers", None)?,
        "encoder_attention_heads": encoder.size("num_attention_heads", None)?,
        "encoder_ffn_dim": encoder.size("ffn_hidden_size", None)?,
        "decoder_layers": decoder.size("num_hidden_layers", None)?,
        "decoder_attention_heads": decoder.size("num_attention_heads", None)?,
        "decoder_ffn_dim": decoder.size("ffn_hidden_size", None)?,
        "activation_function": decoder.get("hidden_act"),
        "max_position_embeddings": decoder.size("max_position_embeddings", None)?,
        "scale_embedding": decoder.flag("has_embedding_scale", false)?,
        "decoder_start_token_id": decoder.get("decoder_start_token_id"),
        "bos_token_id": decoder.get("bos_token_id"),
        "torch_dtype": decoder.get("dtype"),
    }))
}

fn check_same(encoder: &Settings, decoder: &Settings, keys: &[&str]) -> Result<(), RankFault> {
    let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), plain);
    for key in keys {
        let (one, other) = (encoder.get(key), decoder.get(key));
        if one != other {
            return Err(RankFault::Sides { key: (*key).into(), encoder: shown(one), decoder: shown(other) });
        }
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn into_object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}
