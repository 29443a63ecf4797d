//! LLaVA-1.5: CLIP features through a projector into LLaMA's prompt (Liu et al. 2023, arXiv 2310.03744).
//! Names and semantics of `transformers/models/llava/modeling_llava.py`.
use super::{Alias, Aspect, Entry, Logits, PictureFacts};
use crate::config::Keys;
use crate::families::{clip, llama::Llama, projector::Projector, vit::Vit};
use crate::{Axis, DType, Graph, GraphError, Network, Type};

/// Canonical names are those of the hub's files. transformers 5 renames modules in memory (rows 2 to 6) and saves yet
/// another mix (last row); see the key mapping in its `conversion_mapping.py`.
pub(super) const ALIASES: &[Alias] = &[
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "vision_tower."),
];

/// Which tokens of the vision tower are features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    /// Without the class token.
    Default,
    Full,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Llava {
    pub vision: Vit,
    pub language: Llama,
    projector: Projector,
    strategy: Strategy,
    /// Entries of the hidden states, counted from 0; several are joined feature by feature.
    feature_layers: Vec<usize>,
    image_token_id: usize,
}

impl Llava {
    pub(super) fn from_config(keys: &Keys) -> Result<Llava, GraphError> {
        let (vision_keys, text_keys) = (keys.object("vision_config")?, keys.object("text_config")?);
        for (keys, wanted) in [(&vision_keys, "clip_vision_model"), (&text_keys, "llama")] {
            let found = keys.text("model_type", wanted)?;
            if found != wanted {
                return Err(keys.fault("model_type", format!("wanted `{wanted}`, found `{found}`")));
            }
        }
        let vision = clip::from_config(&vision_keys)?;
        let mut language = Llama::from_config(&text_keys)?;
        // The outer flag is the one that transformers obeys for the whole model, where it is given.
        language.tied = keys.flag("tie_word_embeddings", language.tied)?;
        let strategy = match keys.text("vision_feature_select_strategy", "default")? {
            "default" => Strategy::Default,
            "full" => Strategy::Full,
            other => {
                let reason = format!("wanted `default` or `full`, found `{other}`");
                return Err(keys.fault("vision_feature_select_strategy", reason));
            }
        };
        let projector = Projector {
            out: language.hidden,
            activation: keys.activation("projector_hidden_act", "gelu")?,
            bias: keys.flag("multimodal_projector_bias", true)?,
        };
        let image_token_id = keys.size("image_token_index", keys.size("image_token_id", 32000)?)?;
        let feature_layers = feature_layers(keys, "vision_feature_layer", vision.layers)?;
        Ok(Llava { vision, language, projector, strategy, feature_layers, image_token_id })
    }

    /// Pixels in, rows of the prompt table out.
    ///
    /// Input `input` `[batch, channels, image_size, image_size]`, output `output` `[batch, features, hidden]`.
    pub(super) fn vision(&self, dtype: DType) -> Result<Network, GraphError> {
        let graph = Graph::new("vision", dtype);
        let size = self.vision.image_size.into();
        let shape = [Axis::Batch.into(), self.vision.channels.into(), size, size];
        let pixels = graph.input("input", Type::new(dtype, shape));
        let deepest = self.feature_layers.iter().copied().max().unwrap_or(0);
        let states = clip::hidden_states(&self.vision, &graph.scope("vision_tower.vision_model"), pixels, deepest);
        let chosen: Vec<_> = self.feature_layers.iter().map(|&layer| states[layer]).collect();
        let mut features = chosen[0];
        if chosen.len() > 1 {
            features = features.concat(2, &chosen[1..]);
        }
        if self.strategy == Strategy::Default {
            features = features.slice(1, 1, 1 + self.vision.patches());
        }
        graph.output("output", self.projector.write(&graph.scope("multi_modal_projector"), features));
        graph.finish()
    }

    pub(super) fn language(&self, dtype: DType, logits: Logits) -> Result<Network, GraphError> {
        let graph = Graph::new("language", dtype);
        self.language.write(&graph, &graph.scope("language_model"), true, logits);
        graph.finish()
    }

    pub(super) fn picture_facts(&self) -> PictureFacts {
        let class = usize::from(self.strategy == Strategy::Full);
        let size = self.vision.image_size;
        PictureFacts {
            token_id: Some(self.image_token_id),
            features: self.vision.patches() + class,
            size: [size, size],
            aspect: Aspect::Processor,
            entry: Entry::Prompt,
        }
    }

    pub(super) fn ignores(&self, name: &str) -> bool {
        let deepest = self.feature_layers.iter().copied().max().unwrap_or(0);
        name.strip_prefix("vision_tower.vision_model.").is_some_and(|rest| never_runs(rest, deepest))
    }
}

/// Vision blocks after the chosen hidden state and the norm behind them are in the file but never run.
pub(super) fn never_runs(name: &str, deepest: usize) -> bool {
    let block = name.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
    name.starts_with("post_layernorm.") || block.is_some_and(|block: usize| block >= deepest)
}

/// One entry of the hidden states or a list of them under `key`; negative ones count from the end.
pub(super) fn feature_layers(keys: &Keys, key: &str, layers: usize) -> Result<Vec<usize>, GraphError> {
    let entry = |found: i64| {
        let position = if found < 0 { found + layers as i64 + 1 } else { found };
        usize::try_from(position)
            .ok()
            .filter(|&position| position <= layers)
            .ok_or_else(|| keys.fault(key, format!("entry {found} is outside the {} hidden states", layers + 1)))
    };
    match keys.get(key) {
        Some(serde_json::Value::Array(list)) if !list.is_empty() => list
            .iter()
            .map(|found| entry(found.as_i64().ok_or_else(|| keys.wrong(key, "whole numbers", found))?))
            .collect(),
        _ => Ok(vec![entry(keys.integer(key)?.unwrap_or(-2))?]),
    }
}
