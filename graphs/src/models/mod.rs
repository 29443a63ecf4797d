//! Models: which family feeds which, and the one list from `architectures` to a model.
mod blip2;
mod llava;
mod nougat;
mod vila;

use crate::config::Keys;
use crate::families::{donut_swin::DonutSwin, llama::Llama, mbart::Mbart, opt::Opt, t5::T5};
use crate::{ActivationKind, DType, Graph, GraphError, Heads, Network};
pub use blip2::{Blip2, Blip2Language};
pub use llava::Llava;
pub use nougat::Nougat;
use serde::{Deserialize, Serialize};
use serde_json::Value;
pub use vila::Vila;

/// Which tokens' logits the language network gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// Of the last token of each request: for generation.
    Last,
    /// Of every token: for scoring text and for comparing with other implementations.
    All,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    Llama(Llama),
    Opt(Opt),
    T5(T5),
    Mbart(Mbart),
    Llava(Llava),
    Blip2(Blip2),
    Vila(Vila),
    Nougat(Nougat),
}

/// What the runtime and the engine directory must know of a model besides its networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Hugging Face's class.
    pub architecture: &'static str,
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// Ids from here on are rows of the prompt table.
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub max_positions: usize,
    /// Encoder-decoder models: the token that the decoder starts with.
    pub decoder_start_id: Option<usize>,
    pub decoder: DecoderFacts,
    pub pictures: Option<PictureFacts>,
}

/// What the engine directory's config says of the decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderFacts {
    pub heads: Heads,
    pub ffn: usize,
    pub activation: ActivationKind,
    pub epsilon: f32,
    pub positions: Positions,
}

/// How a decoder tells positions apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    Rotary {
        base: f32,
    },
    Learned,
    /// By a bias for how far two tokens are apart.
    Relative,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureFacts {
    /// Id of `<image>` in the tokenizer; none where the checkpoint has no such token, or prompts are split at the text.
    pub token_id: Option<usize>,
    /// Rows of the prompt table that one picture fills.
    pub features: usize,
    /// Height and width of the vision network's input, in pixels.
    pub size: [usize; 2],
    pub aspect: Aspect,
    pub entry: Entry,
}

/// Where a picture's features go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// Into the prompt, as rows of the prompt table.
    #[default]
    Prompt,
    /// To the decoder of an encoder-decoder model, in the place of a text that was read: one picture for each request.
    Source,
}

/// What becomes of a picture that is not square, before the checkpoint's image processor sees it (`image_aspect_ratio`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aspect {
    /// Nothing: the processor crops or resizes it.
    #[default]
    Processor,
    /// It is centred on a square of the mean colour.
    Pad,
    /// It is stretched to the vision network's size.
    Resize,
}

/// What precedes the names of tensors that lie in a vision tower's own folder.
pub const VISION_TOWER: &str = "vision_tower.";

/// A prefix of canonical names and one that some files have in its place.
pub type Alias = (&'static str, &'static str);

impl Model {
    /// The folder or hub model of the vision tower, by config.json of a checkpoint that comes without one (LLaVA's own).
    /// The tower's config is wanted under `vision_config` by [`Model::from_config`].
    pub fn vision_tower(config: &Value) -> Option<&str> {
        let has = |key: &str| config.get(key).is_some_and(|value| !value.is_null());
        let own = ["vision_config", "vision_tower_cfg"].into_iter().any(has);
        config.get("mm_vision_tower")?.as_str().filter(|_| !own)
    }

    /// Recognises the model by `architectures`, or by `model_type` where that is missing.
    ///
    /// # Errors
    /// [`GraphError::Config`] with the key.
    pub fn from_config(config: &Value) -> Result<Model, GraphError> {
        let keys = Keys::new(config);
        let architecture = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        match (architecture, keys.text("model_type", "")?) {
            (Some("LlamaForCausalLM"), _) | (None, "llama") => Ok(Model::Llama(Llama::from_config(&keys)?)),
            (Some("OPTForCausalLM"), _) | (None, "opt") => Ok(Model::Opt(Opt::from_config(&keys)?)),
            (Some("T5ForConditionalGeneration"), _) | (None, "t5") => Ok(Model::T5(T5::from_config(&keys)?)),
            (Some("MBartForConditionalGeneration"), _) | (None, "mbart") => {
                Ok(Model::Mbart(Mbart::from_config(&keys, true)?))
            }
            (Some("MBartForCausalLM"), _) => Ok(Model::Mbart(Mbart::from_config(&keys, false)?)),
            (Some("VisionEncoderDecoderModel"), _) | (None, "vision-encoder-decoder") => {
                Ok(Model::Nougat(Nougat::from_config(&keys)?))
            }
            (Some("LlavaForConditionalGeneration"), _) | (None, "llava") => {
                Ok(Model::Llava(Llava::from_config(&keys)?))
            }
            (Some("Blip2ForConditionalGeneration"), _) | (None, "blip-2") => {
                Ok(Model::Blip2(Blip2::from_config(&keys)?))
            }
            (Some("LlavaLlamaModel" | "LlavaLlamaForCausalLM"), _) | (None, "llava_llama") => {
                Ok(Model::Vila(Vila::from_config(&keys)?))
            }
            (Some(other), _) => Err(keys.fault("architectures", format!("`{other}` is not supported"))),
            (None, "") => Err(keys.fault("architectures", "missing, and no `model_type` either".into())),
            (None, other) => Err(keys.fault("model_type", format!("`{other}` is not supported"))),
        }
    }

    /// The same model with another language part, which comes from a checkpoint of its own.
    ///
    /// # Errors
    /// A model without a language part that can be another, or one whose sizes do not fit.
    pub fn with_language(self, language: Model) -> Result<Model, GraphError> {
        match (self, language) {
            (Model::Blip2(blip2), Model::Opt(opt)) => Ok(Model::Blip2(blip2.with_language(Blip2Language::Opt(opt))?)),
            (Model::Blip2(blip2), Model::T5(t5)) => Ok(Model::Blip2(blip2.with_language(Blip2Language::T5(t5))?)),
            (model, other) => {
                let (model, other) = (model.facts().model_type, other.facts().model_type);
                let reason =
                    format!("`{other}` cannot be the language part of `{model}`, only `opt` or `t5` that of `blip-2`");
                Err(GraphError::Config { key: "model_type".into(), reason })
            }
        }
    }

    /// The same model with another token that its decoder starts with, where that is an encoder-decoder's.
    pub fn starting_with(mut self, id: usize) -> Model {
        match &mut self {
            Model::T5(t5) | Model::Blip2(Blip2 { language: Blip2Language::T5(t5), .. }) => t5.start_id = id,
            Model::Mbart(mbart) | Model::Nougat(Nougat { language: mbart, .. }) => mbart.start_id = id,
            Model::Llama(_) | Model::Opt(_) | Model::Llava(_) | Model::Blip2(_) | Model::Vila(_) => {}
        }
        self
    }

    /// Prefix of the canonical names of the language part, where a model has others too.
    pub fn language_prefix(&self) -> &'static str {
        match self {
            Model::Llama(_) | Model::Opt(_) | Model::T5(_) | Model::Mbart(_) => "",
            Model::Llava(_) | Model::Blip2(_) => "language_model.",
            Model::Vila(_) => "llm.",
            Model::Nougat(_) => "decoder.",
        }
    }

    /// The sub-networks in the order in which they run, verified.
    ///
    /// # Errors
    /// The first node that does not fit.
    pub fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        let alone = |write: &dyn Fn(&Graph)| {
            let graph = Graph::new("language", dtype);
            write(&graph);
            graph.finish()
        };
        let networks = match self {
            Model::Llama(llama) => vec![alone(&|graph| llama.write(graph, &graph.scope(""), false, logits))?],
            Model::Opt(opt) => vec![alone(&|graph| opt.write(graph, &graph.scope(""), false, logits))?],
            Model::T5(t5) => t5.networks(dtype, "", false, logits)?,
            Model::Mbart(mbart) => mbart.networks(dtype, logits)?,
            Model::Nougat(nougat) => nougat.networks(dtype, logits)?,
            Model::Llava(llava) => vec![llava.vision(dtype)?, llava.language(dtype, logits)?],
            Model::Blip2(blip2) => blip2.networks(dtype, logits)?,
            Model::Vila(vila) => vec![vila.vision(dtype)?, vila.language(dtype, logits)?],
        };
        networks.iter().try_for_each(crate::verify)?;
        Ok(networks)
    }

    pub fn facts(&self) -> Facts {
        match self {
            Model::Llama(llama) => llama.facts(),
            Model::Opt(opt) => opt.facts(),
            Model::T5(t5) => t5.facts(),
            Model::Mbart(mbart) => mbart.facts(),
            Model::Nougat(nougat) => nougat.facts(),
            Model::Llava(llava) => Facts {
                architecture: "LlavaForConditionalGeneration",
                model_type: "llava",
                pictures: Some(llava.picture_facts()),
                ..llava.language.facts()
            },
            Model::Blip2(blip2) => Facts {
                architecture: "Blip2ForConditionalGeneration",
                model_type: "blip-2",
                pictures: Some(blip2.picture_facts()),
                ..blip2.language.facts()
            },
            Model::Vila(vila) => Facts {
                architecture: "LlavaLlamaModel",
                model_type: "llava_llama",
                pictures: Some(vila.picture_facts()),
                ..vila.language.facts()
            },
        }
    }

    /// Other spellings of the canonical names (those of the hub's files).
    pub fn aliases(&self) -> &'static [Alias] {
        match self {
            Model::Llama(_) => &[("model.", "")],
            Model::Opt(_) => &[("model.decoder.", "decoder.")],
            Model::Llava(_) => llava::ALIASES,
            Model::T5(_) => T5::ALIASES,
            Model::Mbart(_) => Mbart::ALIASES,
            Model::Nougat(_) => nougat::ALIASES,
            Model::Blip2(blip2) => blip2.language.aliases(),
            Model::Vila(_) => vila::ALIASES,
        }
    }

    /// Whether a tensor may lie in the file unused: `name` is canonical.
    pub fn ignores(&self, name: &str) -> bool {
        let buffer = name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".embeddings.position_ids");
        let (tied, head, own) = match self {
            Model::Llama(llama) => (llama.tied, "lm_head.weight", false),
            Model::Opt(opt) => (opt.tied, "lm_head.weight", false),
            Model::T5(_) => (false, "", T5::ignores(name)),
            Model::Mbart(mbart) => (false, "", mbart.ignores(name)),
            Model::Nougat(_) => (false, "", DonutSwin::ignores(name)),
            Model::Llava(llava) => (llava.language.tied, "language_model.lm_head.weight", llava.ignores(name)),
            Model::Vila(vila) => (vila.language.tied, "llm.lm_head.weight", vila.ignores(name)),
            Model::Blip2(blip2) => (blip2.language.tied(), "language_model.lm_head.weight", Blip2::ignores(name)),
        };
        // A tied head that is saved all the same repeats the embedding.
        buffer || own || (tied && name == head)
    }
}
