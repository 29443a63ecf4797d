//! `config.json` of an engine, in TensorRT-LLM's shape (`version`, `pretrained_config`, `build_config`), so that scripts
//! which read it go on; and the sizes an engine is built for.
use crate::processor::PromptTemplate;
use graphs::{Aspect, DType, Entry, Facts, Model, Positions};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

/// What an engine accepts. Names are TensorRT-LLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Requests in one call.
    pub max_batch_size: usize,
    /// Tokens of one prompt, picture features included.
    pub max_input_len: usize,
    /// New tokens of one request.
    pub max_output_len: usize,
    /// Rows of the key/value cache: prompt and new tokens.
    pub max_seq_len: usize,
    /// Rows of the prompt table: picture features of all requests of a call.
    pub max_prompt_embedding_table_size: usize,
}

/// Sizes as typed; what is left out is derived from the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct SizeRequest {
    pub max_batch_size: usize,
    pub max_input_len: Option<usize>,
    pub max_output_len: Option<usize>,
    pub max_multimodal_len: Option<usize>,
}

#[derive(Debug, Error, PartialEq)]
#[error("{0}")]
pub struct SizeError(String, String);

impl SizeError {
    pub fn hint(&self) -> Option<String> {
        Some(self.1.clone())
    }
}

/// Tokens of text that a prompt may have beside its pictures where nothing is typed.
const TEXT: usize = 1024;

impl SizeRequest {
    /// # Errors
    /// Sizes that the model cannot have, with the largest that fit.
    pub fn resolve(&self, facts: &Facts) -> Result<Sizes, SizeError> {
        let features = facts.pictures.map_or(0, |pictures| pictures.features);
        let positions = facts.max_positions;
        // A page in the place of a prompt: the decoder starts with one token and writes for as long as it can.
        let page = facts.pictures.is_some_and(|pictures| pictures.entry == Entry::Source);
        let output = if page { positions } else { (positions / 4).clamp(1, 512) };
        let output = self.max_output_len.unwrap_or(output);
        let input = if page { 1 } else { (features + TEXT).min(positions.saturating_sub(output)) };
        let input = self.max_input_len.unwrap_or(input);
        let table = self.max_batch_size.saturating_mul(features);
        if self.max_batch_size == 0 || input == 0 || output == 0 {
            return Err(SizeError("sizes must be at least 1".into(), "leave them out to have them derived".into()));
        }
        if page && output > positions {
            let message = format!("`max_output_len` {output} exceeds the model's {positions} positions");
            return Err(SizeError(message, format!("use --max-output-len {positions}")));
        }
        if input <= features && !page {
            let message = format!("`max_input_len` {input} leaves no token beside the {features} of a picture");
            return Err(SizeError(message, format!("use at least {}", features + 1)));
        }
        // An encoder has places of its own, and the decoder's are all for new tokens.
        let (needed, rows) = match facts.decoder_start_id {
            Some(_) => (input.max(output), output),
            None => (input.saturating_add(output), input.saturating_add(output)),
        };
        if needed > positions {
            let message =
                format!("`max_input_len` {input} + `max_output_len` {output} exceed the model's {positions} positions");
            return Err(SizeError(message, format!("use --max-input-len {}", positions.saturating_sub(output))));
        }
        if let Some(typed) = self.max_multimodal_len.filter(|&typed| typed < table) {
            let message = format!(
                "`max_multimodal_len` {typed} is below {table}, which is {} requests x {features} picture features",
                self.max_batch_size
            );
            return Err(SizeError(message, "leave --max-multimodal-len out: it is derived".into()));
        }
        Ok(Sizes {
            max_batch_size: self.max_batch_size,
            max_input_len: input,
            max_output_len: output,
            max_seq_len: rows,
            max_prompt_embedding_table_size: self.max_multimodal_len.unwrap_or(table),
        })
    }
}

/// How pictures enter the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Multimodal {
    /// None where the checkpoint has no such token: BLIP-2 needs none, VILA splits the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_token_id: Option<usize>,
    /// Prompt table rows of one picture.
    pub num_visual_features: usize,
    /// Height and width in pixels.
    pub image_size: [usize; 2],
    #[serde(default)]
    pub image_aspect_ratio: Aspect,
    #[serde(default)]
    pub prompt_template: PromptTemplate,
    /// Where features go: into the prompt, or to the decoder in the place of what an `encoder` gives.
    #[serde(default, skip_serializing_if = "is_default")]
    pub entry: Entry,
}

fn is_default(entry: &Entry) -> bool {
    *entry == Entry::default()
}

/// The file; `pretrained_config` keeps keys beyond those the runtime needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineConfig {
    pub version: String,
    pub pretrained_config: PretrainedConfig,
    pub build_config: Sizes,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PretrainedConfig {
    pub architecture: String,
    pub model_type: String,
    pub dtype: DType,
    pub vocab_size: usize,
    pub hidden_size: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multimodal: Option<Multimodal>,
    /// Encoder-decoder models: what the decoder starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoder_start_token_id: Option<usize>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl EngineConfig {
    pub fn new(model: &Model, dtype: DType, quantization: Value, tp: usize, sizes: Sizes) -> EngineConfig {
        let facts = model.facts();
        let decoder = &facts.decoder;
        let mut rest = json!({
            "logits_dtype": "float32",
            "max_position_embeddings": facts.max_positions,
            "num_hidden_layers": facts.layers,
            "num_attention_heads": decoder.heads.query,
            "num_key_value_heads": decoder.heads.key_value,
            "head_size": decoder.heads.dim,
            "hidden_act": decoder.activation,
            "intermediate_size": decoder.ffn,
            "norm_epsilon": decoder.epsilon,
            "mapping": { "world_size": tp, "tp_size": tp, "pp_size": 1 },
            "quantization": quantization,
        });
        match decoder.positions {
            Positions::Rotary { base } => {
                rest["position_embedding_type"] = json!("rope_gpt_neox");
                rest["rotary_base"] = json!(base);
            }
            Positions::Learned => rest["position_embedding_type"] = json!("learned_absolute"),
            Positions::Relative => rest["position_embedding_type"] = json!("relative"),
        }
        let prompt_template = match model {
            Model::Llama(_) | Model::Opt(_) | Model::T5(_) | Model::Mbart(_) | Model::Nougat(_) => {
                PromptTemplate::Plain
            }
            Model::Llava(_) => PromptTemplate::Llava,
            Model::Blip2(_) => PromptTemplate::Blip2,
            Model::Vila(_) => PromptTemplate::Vila,
        };
        let multimodal = facts.pictures.map(|pictures| Multimodal {
            image_token_id: pictures.token_id,
            prompt_template,
            num_visual_features: pictures.features,
            image_size: pictures.size,
            image_aspect_ratio: pictures.aspect,
            entry: pictures.entry,
        });
        let pretrained_config = PretrainedConfig {
            architecture: facts.architecture.into(),
            model_type: facts.model_type.into(),
            dtype,
            vocab_size: facts.vocab,
            hidden_size: facts.hidden,
            multimodal,
            decoder_start_token_id: facts.decoder_start_id,
            rest: rest.as_object().cloned().unwrap_or_default(),
        };
        EngineConfig { version: env!("CARGO_PKG_VERSION").into(), pretrained_config, build_config: sizes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::PictureFacts;

    fn facts(positions: usize) -> Facts {
        let config = json!({ "model_type": "llama", "max_position_embeddings": positions });
        let pictures = PictureFacts {
            token_id: Some(32000),
            features: 576,
            size: [336, 336],
            aspect: Aspect::Processor,
            entry: Entry::Prompt,
        };
        Facts { pictures: Some(pictures), ..Model::from_config(&config).unwrap().facts() }
    }

    #[test]
    fn sizes_are_derived() {
        let request = SizeRequest { max_batch_size: 4, ..SizeRequest::default() };
        let sizes = request.resolve(&facts(4096)).unwrap();
        assert_eq!((sizes.max_input_len, sizes.max_output_len, sizes.max_seq_len), (1600, 512, 2112));
        assert_eq!(sizes.max_prompt_embedding_table_size, 4 * 576);
    }

    #[test]
    fn a_page_leaves_all_positions_to_the_answer() {
        let whole = facts(4096);
        let pictures = whole.pictures.map(|pictures| PictureFacts { entry: Entry::Source, ..pictures });
        let page = Facts { pictures, decoder_start_id: Some(0), ..whole };
        let one = SizeRequest { max_batch_size: 1, ..SizeRequest::default() };
        let sizes = one.resolve(&page).unwrap();
        assert_eq!((sizes.max_input_len, sizes.max_output_len, sizes.max_seq_len), (1, 4096, 4096));
        let error = SizeRequest { max_output_len: Some(4097), ..one }.resolve(&page).unwrap_err();
        assert_eq!(error.to_string(), "`max_output_len` 4097 exceeds the model's 4096 positions");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let message = |request: SizeRequest| request.resolve(&facts(4096)).unwrap_err().to_string();
        let one = SizeRequest { max_batch_size: 1, ..SizeRequest::default() };
        assert_eq!(
            message(SizeRequest { max_input_len: Some(576), ..one }),
            "`max_input_len` 576 leaves no token beside the 576 of a picture"
        );
        assert_eq!(
            message(SizeRequest { max_input_len: Some(4000), ..one }),
            "`max_input_len` 4000 + `max_output_len` 512 exceed the model's 4096 positions"
        );
        assert_eq!(
            message(SizeRequest { max_batch_size: 2, max_multimodal_len: Some(576), ..one }),
            "`max_multimodal_len` 576 is below 1152, which is 2 requests x 576 picture features"
        );
        assert_eq!(message(SizeRequest::default()), "sizes must be at least 1");
    }
}
