//! CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020).
//! Names and semantics of `transformers/models/clip/modeling_clip.py`; `pre_layrnorm` is spelled so there.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Heads, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: usize,
    /// Side of the square picture, in pixels.
    pub image_size: usize,
    pub patch: usize,
    pub channels: usize,
    pub activation: ActivationKind,
    pub epsilon: f32,
}

impl Clip {
    pub(crate) fn from_config(keys: &Keys) -> Result<Clip, GraphError> {
        let clip = Clip {
            hidden: keys.size("hidden_size", 768)?,
            ffn: keys.size("intermediate_size", 3072)?,
            layers: keys.size("num_hidden_layers", 12)?,
            heads: keys.size("num_attention_heads", 12)?,
            image_size: keys.size("image_size", 224)?,
            patch: keys.size("patch_size", 32)?,
            channels: keys.size("num_channels", 3)?,
            activation: keys.activation("hidden_act", "quick_gelu")?,
            epsilon: keys.positive("layer_norm_eps", 1e-5)?,
        };
        if !clip.hidden.is_multiple_of(clip.heads) {
            let reason = format!("hidden_size {} does not divide by {} heads", clip.hidden, clip.heads);
            return Err(keys.fault("num_attention_heads", reason));
        }
        if clip.patch > clip.image_size {
            let reason = format!("a patch of {} does not fit a picture of {}", clip.patch, clip.image_size);
            return Err(keys.fault("patch_size", reason));
        }
        Ok(clip)
    }

    /// Patches of one picture, without the class token.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch).pow(2)
    }

    /// Hidden states `[batch, 1 + patches, hidden]`: entry 0 is the input of the first block, entry n the output of
    /// block n. Blocks after the last `wanted` entry are not written.
    pub(crate) fn hidden_states<'g>(&self, s: &Scope<'g>, pixels: Tensor<'g>, wanted: usize) -> Vec<Tensor<'g>> {
        let embeddings = s.sub("embeddings");
        let patches = embeddings.patches("patch_embedding", self.hidden, self.patch, pixels);
        let batch = patches.ty().shape[0];
        let patches = patches.reshape([batch, self.hidden.into(), self.patches().into()]).transpose(&[0, 2, 1]);
        let class = embeddings.broadcast("class_embedding", &[self.hidden], patches);
        let tokens = class.reshape([batch, 1.into(), self.hidden.into()]).concat(1, &[patches]);
        let positions = [1 + self.patches(), self.hidden];
        let x = embeddings.add_parameter("position_embedding.weight", &positions, tokens);
        let mut states = vec![s.layer_norm("pre_layrnorm", self.epsilon).of(x)];
        for layer in 0..wanted {
            states.push(self.layer(&s.layer("encoder.layers", layer), states[layer]));
        }
        states
    }

    fn layer<'g>(&self, s: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let (attn, mlp) = (s.sub("self_attn"), s.sub("mlp"));
        let heads = Heads { query: self.heads, key_value: self.heads, dim: self.hidden / self.heads };
        let normed = s.layer_norm("layer_norm1", self.epsilon).of(x);
        let [q, k, v] =
            ["q_proj", "k_proj", "v_proj"].map(|name| attn.linear(name, self.hidden).bias().column().of(normed));
        let mixed = attn.attention(heads).of(q, k, v);
        let x = x + attn.linear("out_proj", self.hidden).bias().row().of(mixed);
        let normed = s.layer_norm("layer_norm2", self.epsilon).of(x);
        let wide = mlp.linear("fc1", self.ffn).bias().column().of(normed).activation(self.activation);
        x + mlp.linear("fc2", self.hidden).bias().row().of(wide)
    }
}
