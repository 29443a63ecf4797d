//! EVA's vision transformer, as BLIP-2 has it (Fang et al. 2022, arXiv 2211.07636).
//! Names and semantics of `Blip2VisionModel` in `transformers/models/blip_2/modeling_blip_2.py`.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Heads, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Eva {
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: usize,
    /// Side of the square picture, in pixels.
    pub image_size: usize,
    pub patch: usize,
    pub activation: ActivationKind,
    pub epsilon: f32,
    pub qkv_bias: bool,
}

impl Eva {
    pub const CHANNELS: usize = 3;

    pub(crate) fn from_config(keys: &Keys) -> Result<Eva, GraphError> {
        let eva = Eva {
            hidden: keys.size("hidden_size", 1408)?,
            ffn: keys.size("intermediate_size", 6144)?,
            layers: keys.size("num_hidden_layers", 39)?,
            heads: keys.size("num_attention_heads", 16)?,
            image_size: keys.size("image_size", 224)?,
            patch: keys.size("patch_size", 14)?,
            activation: keys.activation("hidden_act", "gelu")?,
            epsilon: keys.positive("layer_norm_eps", 1e-6)?,
            qkv_bias: keys.flag("qkv_bias", true)?,
        };
        if !eva.hidden.is_multiple_of(eva.heads) {
            let reason = format!("hidden_size {} does not divide by {} heads", eva.hidden, eva.heads);
            return Err(keys.fault("num_attention_heads", reason));
        }
        if eva.patch > eva.image_size {
            let reason = format!("a patch of {} does not fit a picture of {}", eva.patch, eva.image_size);
            return Err(keys.fault("patch_size", reason));
        }
        Ok(eva)
    }

    /// Patches of one picture, without the class token.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch).pow(2)
    }

    /// Pixels `[batch, 3, image_size, image_size]` to `[batch, 1 + patches, hidden]`, the norm behind the blocks included.
    pub(crate) fn write<'g>(&self, s: &Scope<'g>, pixels: Tensor<'g>) -> Tensor<'g> {
        let embeddings = s.sub("embeddings");
        let patches = embeddings.patches("patch_embedding", self.hidden, self.patch, pixels);
        let batch = patches.ty().shape[0];
        let patches = patches.reshape([batch, self.hidden.into(), self.patches().into()]).transpose(&[0, 2, 1]);
        let patches = embeddings.add_parameter("patch_embedding.bias", &[self.hidden], patches);
        let class = embeddings.broadcast("class_embedding", &[1, 1, self.hidden], patches);
        let tokens = class.reshape([batch, 1.into(), self.hidden.into()]).concat(1, &[patches]);
        let positions = [1, 1 + self.patches(), self.hidden];
        let mut x = embeddings.add_parameter("position_embedding", &positions, tokens);
        for layer in 0..self.layers {
            x = self.layer(&s.layer("encoder.layers", layer), x);
        }
        s.layer_norm("post_layernorm", self.epsilon).of(x)
    }

    fn layer<'g>(&self, s: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let (attn, mlp) = (s.sub("self_attn"), s.sub("mlp"));
        let heads = Heads { query: self.heads, key_value: self.heads, dim: self.hidden / self.heads };
        let normed = s.layer_norm("layer_norm1", self.epsilon).of(x);
        // One matrix, first all rows of the query, then the key's and the value's. Not split over ranks: a part of the
        // columns would not be a part of each of the three.
        let qkv = attn.linear("qkv", 3 * self.hidden).bias_if(self.qkv_bias).of(normed);
        let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(2, part * self.hidden, (part + 1) * self.hidden));
        let x = x + attn.linear("projection", self.hidden).bias().of(attn.attention(heads).of(q, k, v));
        let normed = s.layer_norm("layer_norm2", self.epsilon).of(x);
        let wide = mlp.linear("fc1", self.ffn).bias().column().of(normed).activation(self.activation);
        x + mlp.linear("fc2", self.hidden).bias().row().of(wide)
    }
}
