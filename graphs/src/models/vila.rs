//! VILA 1.5 (three folders, SigLIP) and VILA 1.0 (one flat checkpoint in original LLaVA's names, CLIP): vision features
//! through a projector into LLaMA's prompt (Lin et al. 2023, arXiv 2312.07533).
//! LLaVA's own layout is VILA 1.0's without the vision tower, which it takes from a folder of its own.
//! Names and semantics of the VILA sources, `llava/model/llava_arch.py` of tag v1.0 and of branch vila1.5.
use super::llava::{feature_layers, never_runs};
use super::{Alias, Aspect, Entry, Logits, PictureFacts};
use crate::config::Keys;
use crate::families::{clip, llama::Llama, siglip, vila_projector::VilaProjector, vit::Vit};
use crate::{Axis, DType, Graph, GraphError, Network, Scope, Tensor, Type};

/// Canonical names are those of VILA 1.5: the folder of the part, then the name in it. The other rows are flat
/// checkpoints, and vision towers that transformers 5 saved.
pub(super) const ALIASES: &[Alias] = &[
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower."),
    ("mm_projector.layers.", "model.mm_projector."),
    ("llm.", ""),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tower {
    Clip,
    Siglip,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Vila {
    pub vision: Vit,
    pub language: Llama,
    tower: Tower,
    projector: VilaProjector,
    /// Entry of the hidden states, counted from 0.
    feature_layer: usize,
    aspect: Aspect,
}

impl Vila {
    /// The parts' configs are nested in the root's (1.5); a flat one's language is the root itself and its vision tower
    /// is `vision_config`.
    pub(super) fn from_config(keys: &Keys) -> Result<Vila, GraphError> {
        let parts = keys.get("llm_cfg").is_some();
        let text_keys = if parts { keys.object("llm_cfg")? } else { keys.clone() };
        let kind = text_keys.text("model_type", "llama")?;
        if parts && kind != "llama" {
            return Err(text_keys.fault("model_type", format!("wanted `llama`, found `{kind}`")));
        }
        let language = Llama::from_config(&text_keys)?;
        let (tower, vision) = vision_tower(keys)?;
        let projector = match keys.get("mm_projector_cfg") {
            Some(_) => VilaProjector::from_config(&keys.object("mm_projector_cfg")?)?,
            None => VilaProjector::from_config(keys)?,
        };
        let wanted = if tower == Tower::Clip { "patch" } else { "cls_patch" };
        let select = keys.text("mm_vision_select_feature", wanted)?;
        if select != wanted {
            // VILA's code drops the first token for `patch`, be it a class token or not.
            let reason = format!("wanted `{wanted}` with this vision tower, found `{select}`");
            return Err(keys.fault("mm_vision_select_feature", reason));
        }
        for key in ["s2", "mm_use_im_start_end"] {
            if keys.flag(key, false)? {
                return Err(keys.fault(key, "`true` is not supported".into()));
            }
        }
        let aspect = match keys.text("image_aspect_ratio", "square")? {
            "pad" => Aspect::Pad,
            "resize" => Aspect::Resize,
            "square" => Aspect::Processor,
            other => {
                let reason = format!("wanted `pad`, `resize` or `square`, found `{other}`");
                return Err(keys.fault("image_aspect_ratio", reason));
            }
        };
        let key = "mm_vision_select_layer";
        let &[feature_layer] = &feature_layers(keys, key, vision.layers)?[..] else {
            return Err(keys.fault(key, "several layers are not supported".into()));
        };
        Ok(Vila { vision, language, tower, projector, feature_layer, aspect })
    }

    /// Pixels in, rows of the prompt table out.
    ///
    /// Input `input` `[batch, channels, image_size, image_size]`, output `output` `[batch, features, hidden]`.
    pub(super) fn vision(&self, dtype: DType) -> Result<Network, GraphError> {
        let graph = Graph::new("vision", dtype);
        let size = self.vision.image_size.into();
        let shape = [Axis::Batch.into(), self.vision.channels.into(), size, size];
        let pixels = graph.input("input", Type::new(dtype, shape));
        let features = self.features(&graph.scope("vision_tower.vision_model"), pixels);
        let projector = graph.scope("mm_projector");
        graph.output("output", self.projector.write(&projector, features, self.vision.side(), self.language.hidden));
        graph.finish()
    }

    fn features<'g>(&self, s: &Scope<'g>, pixels: Tensor<'g>) -> Tensor<'g> {
        let last = self.feature_layer;
        match self.tower {
            Tower::Siglip => siglip::hidden_states(&self.vision, s, pixels, last)[last],
            Tower::Clip => {
                let states = clip::hidden_states(&self.vision, s, pixels, last);
                states[last].slice(1, 1, 1 + self.vision.patches())
            }
        }
    }

    pub(super) fn language(&self, dtype: DType, logits: Logits) -> Result<Network, GraphError> {
        let graph = Graph::new("language", dtype);
        self.language.write(&graph, &graph.scope("llm"), true, logits);
        graph.finish()
    }

    pub(super) fn picture_facts(&self) -> PictureFacts {
        let size = self.vision.image_size;
        let features = self.projector.rows(self.vision.side());
        PictureFacts { token_id: None, features, size: [size, size], aspect: self.aspect, entry: Entry::Prompt }
    }

    /// SigLIP's pooling head and CLIP's text side, besides what no vision tower runs.
    pub(super) fn ignores(&self, name: &str) -> bool {
        let other = ["text_model.", "logit_scale", "logit_bias", "visual_projection.", "text_projection."];
        if name.strip_prefix(super::VISION_TOWER).is_some_and(|rest| other.iter().any(|part| rest.starts_with(part))) {
            return true;
        }
        let Some(rest) = name.strip_prefix("vision_tower.vision_model.") else { return false };
        never_runs(rest, self.feature_layer) || (self.tower == Tower::Siglip && rest.starts_with("head."))
    }
}

fn vision_tower(keys: &Keys) -> Result<(Tower, Vit), GraphError> {
    let key = if keys.get("vision_tower_cfg").is_some() { "vision_tower_cfg" } else { "vision_config" };
    let vision = keys.object(key)?;
    match vision.text("model_type", "")? {
        "clip_vision_model" => Ok((Tower::Clip, clip::from_config(&vision)?)),
        "siglip_vision_model" => Ok((Tower::Siglip, siglip::from_config(&vision)?)),
        other => {
            let reason = format!("wanted `clip_vision_model` or `siglip_vision_model`, found `{other}`");
            Err(vision.fault("model_type", reason))
        }
    }
}
