//! EVA's vision transformer, as BLIP-2 has it (Fang et al. 2022, arXiv 2211.07636).
//! Names and semantics of `Blip2VisionModel` in `transformers/models/blip_2/modeling_blip_2.py`.
use super::vit::{Defaults, Vit};
use crate::config::Keys;
use crate::{GraphError, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Eva {
    pub vit: Vit,
    pub qkv_bias: bool,
}

impl Eva {
    pub(crate) fn from_config(keys: &Keys) -> Result<Eva, GraphError> {
        let defaults =
            Defaults { hidden: 1408, ffn: 6144, layers: 39, heads: 16, patch: 14, activation: "gelu", epsilon: 1e-6 };
        // Older configs name the channels, which the model does not read.
        let vit = Vit { channels: 3, ..Vit::from_config(keys, &defaults)? };
        Ok(Eva { vit, qkv_bias: keys.flag("qkv_bias", true)? })
    }

    /// Pixels `[batch, 3, image_size, image_size]` to `[batch, 1 + patches, hidden]`, the norm behind the blocks included.
    pub(crate) fn write<'g>(&self, s: &Scope<'g>, pixels: Tensor<'g>) -> Tensor<'g> {
        let (vit, embeddings) = (&self.vit, s.sub("embeddings"));
        let patches = vit.patch_embedding(&embeddings, pixels);
        let batch = patches.ty().shape[0];
        let patches = embeddings.add_parameter("patch_embedding.bias", &[vit.hidden], patches);
        let class = embeddings.broadcast("class_embedding", &[1, 1, vit.hidden], patches);
        let tokens = class.reshape([batch, 1.into(), vit.hidden.into()]).concat(1, &[patches]);
        let positions = [1, 1 + vit.patches(), vit.hidden];
        let mut x = embeddings.add_parameter("position_embedding", &positions, tokens);
        for layer in 0..vit.layers {
            x = self.layer(&s.layer("encoder.layers", layer), x);
        }
        s.layer_norm("post_layernorm", vit.epsilon).of(x)
    }

    fn layer<'g>(&self, s: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let hidden = self.vit.hidden;
        self.vit.block_with(s, x, |attn, heads, normed| {
            // One matrix, first all rows of the query, then the key's and the value's. Not split over ranks: a part of
            // the columns would not be a part of each of the three.
            let qkv = attn.linear("qkv", 3 * hidden).bias_if(self.qkv_bias).of(normed);
            let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(2, part * hidden, (part + 1) * hidden));
            attn.linear("projection", hidden).bias().of(attn.attention(heads).of(q, k, v))
        })
    }
}
