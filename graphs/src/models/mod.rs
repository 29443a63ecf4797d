//! Models: which family feeds which, and the one list from `architectures` to a model.
mod llava;

use crate::config::Keys;
use crate::families::llama::Llama;
use crate::{DType, Graph, GraphError, Network};
pub use llava::Llava;
use serde_json::Value;

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
    Llava(Llava),
}

/// What the runtime and the engine directory must know of a model besides its networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// Ids from here on are rows of the prompt table.
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub max_positions: usize,
    pub pictures: Option<PictureFacts>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureFacts {
    /// Id of `<image>` in the tokenizer.
    pub token_id: usize,
    /// Rows of the prompt table that one picture fills.
    pub features: usize,
    /// Height and width of the vision network's input, in pixels.
    pub size: [usize; 2],
}

/// A prefix of canonical names and one that some files have in its place.
pub type Alias = (&'static str, &'static str);

impl Model {
    /// Recognises the model by `architectures`, or by `model_type` where that is missing.
    ///
    /// # Errors
    /// [`GraphError::Config`] with the key.
    pub fn from_config(config: &Value) -> Result<Model, GraphError> {
        let keys = Keys::new(config);
        let architecture = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        match (architecture, keys.text("model_type", "")?) {
            (Some("LlamaForCausalLM"), _) | (None, "llama") => Ok(Model::Llama(Llama::from_config(&keys)?)),
            (Some("LlavaForConditionalGeneration"), _) | (None, "llava") => {
                Ok(Model::Llava(Llava::from_config(&keys)?))
            }
            (Some(other), _) => Err(keys.fault("architectures", format!("`{other}` is not supported"))),
            (None, "") => Err(keys.fault("architectures", "missing, and no `model_type` either".into())),
            (None, other) => Err(keys.fault("model_type", format!("`{other}` is not supported"))),
        }
    }

    /// The sub-networks in the order in which they run, verified.
    ///
    /// # Errors
    /// The first node that does not fit.
    pub fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        let networks = match self {
            Model::Llama(llama) => {
                let graph = Graph::new("language", dtype);
                llama.write(&graph, &graph.scope(""), false, logits);
                vec![graph.finish()?]
            }
            Model::Llava(llava) => vec![llava.vision(dtype)?, llava.language(dtype, logits)?],
        };
        networks.iter().try_for_each(crate::verify)?;
        Ok(networks)
    }

    pub fn facts(&self) -> Facts {
        let (model_type, llama, pictures) = match self {
            Model::Llama(llama) => ("llama", llama, None),
            Model::Llava(llava) => ("llava", &llava.language, Some(llava.picture_facts())),
        };
        Facts {
            model_type,
            vocab: llama.vocab,
            hidden: llama.hidden,
            layers: llama.layers,
            max_positions: llama.max_positions,
            pictures,
        }
    }

    /// Other spellings of the canonical names (those of the hub's files).
    pub fn aliases(&self) -> &'static [Alias] {
        match self {
            Model::Llama(_) => &[("model.", "")],
            Model::Llava(_) => llava::ALIASES,
        }
    }

    /// Whether a tensor may lie in the file unused: `name` is canonical.
    pub fn ignores(&self, name: &str) -> bool {
        let buffer = name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".embeddings.position_ids");
        let (llama, head) = match self {
            Model::Llama(llama) => (llama, "lm_head.weight"),
            Model::Llava(llava) => (&llava.language, "language_model.lm_head.weight"),
        };
        // A tied head that is saved all the same repeats the embedding.
        let tied = llama.tied && name == head;
        buffer || tied || matches!(self, Model::Llava(llava) if llava.ignores(name))
    }
}
