//! CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020).
//! Names and semantics of `transformers/models/clip/modeling_clip.py`; `pre_layrnorm` is spelled so there.
use super::vit::{Defaults, Vit};
use crate::config::Keys;
use crate::{GraphError, Scope, Tensor};

pub(crate) fn from_config(keys: &Keys) -> Result<Vit, GraphError> {
    Vit::from_config(keys, &Defaults::base(32, "quick_gelu", 1e-5))
}

/// Hidden states `[batch, 1 + patches, hidden]`, the class token first: entry 0 is the input of the first block, entry n
/// the output of block n. Blocks after the last `wanted` entry are not written.
pub(crate) fn hidden_states<'g>(vit: &Vit, s: &Scope<'g>, pixels: Tensor<'g>, wanted: usize) -> Vec<Tensor<'g>> {
    let embeddings = s.sub("embeddings");
    let patches = vit.patch_embedding(&embeddings, pixels);
    let batch = patches.ty().shape[0];
    let class = embeddings.broadcast("class_embedding", &[vit.hidden], patches);
    let tokens = class.reshape([batch, 1.into(), vit.hidden.into()]).concat(1, &[patches]);
    let positions = [1 + vit.patches(), vit.hidden];
    let x = embeddings.add_parameter("position_embedding.weight", &positions, tokens);
    vit.states(s, s.layer_norm("pre_layrnorm", vit.epsilon).of(x), wanted)
}
