//! SigLIP's vision transformer (Zhai et al. 2023, arXiv 2303.15343): no class token, no norm before the blocks.
//! Names and semantics of `transformers/models/siglip/modeling_siglip.py`. Its pooling head is never run here.
use super::vit::{Defaults, Vit};
use crate::config::Keys;
use crate::{GraphError, Scope, Tensor};

pub(crate) fn from_config(keys: &Keys) -> Result<Vit, GraphError> {
    Vit::from_config(keys, &Defaults::base(16, "gelu_pytorch_tanh", 1e-6))
}

/// Hidden states `[batch, patches, hidden]`: entry 0 is the input of the first block, entry n the output of block n.
/// Blocks after the last `wanted` entry are not written.
pub(crate) fn hidden_states<'g>(vit: &Vit, s: &Scope<'g>, pixels: Tensor<'g>, wanted: usize) -> Vec<Tensor<'g>> {
    let embeddings = s.sub("embeddings");
    let patches = vit.patch_embedding(&embeddings, pixels);
    let patches = embeddings.add_parameter("patch_embedding.bias", &[vit.hidden], patches);
    let positions = [vit.patches(), vit.hidden];
    vit.states(s, embeddings.add_parameter("position_embedding.weight", &positions, patches), wanted)
}
