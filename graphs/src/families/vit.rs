//! The vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) as CLIP, SigLIP and EVA have it: patches, and
//! blocks with the norm before each half. What comes between is the family's.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Heads, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Vit {
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: Heads,
    /// Side of the square picture, in pixels.
    pub image_size: usize,
    pub patch: usize,
    pub channels: usize,
    pub activation: ActivationKind,
    pub epsilon: f32,
}

/// What a config that lacks a key means; the families differ in it.
pub(super) struct Defaults {
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) patch: usize,
    /// Its name in a config.
    pub(super) activation: &'static str,
    pub(super) epsilon: f32,
}

impl Defaults {
    /// CLIP's and SigLIP's base size.
    pub(super) fn base(patch: usize, activation: &'static str, epsilon: f32) -> Defaults {
        Defaults { hidden: 768, ffn: 3072, layers: 12, heads: 12, patch, activation, epsilon }
    }
}

impl Vit {
    pub(super) fn from_config(keys: &Keys, defaults: &Defaults) -> Result<Vit, GraphError> {
        let hidden = keys.size("hidden_size", defaults.hidden)?;
        let vit = Vit {
            hidden,
            ffn: keys.size("intermediate_size", defaults.ffn)?,
            layers: keys.size("num_hidden_layers", defaults.layers)?,
            heads: keys.heads("num_attention_heads", defaults.heads, "hidden_size", hidden)?,
            image_size: keys.size("image_size", 224)?,
            patch: keys.size("patch_size", defaults.patch)?,
            channels: keys.size("num_channels", 3)?,
            activation: keys.activation("hidden_act", defaults.activation)?,
            epsilon: keys.positive("layer_norm_eps", defaults.epsilon)?,
        };
        if vit.patch > vit.image_size {
            let reason = format!("a patch of {} does not fit a picture of {}", vit.patch, vit.image_size);
            return Err(keys.fault("patch_size", reason));
        }
        Ok(vit)
    }

    /// Patches along one side; what is left of the picture beyond the last whole patch is not seen.
    pub fn side(&self) -> usize {
        self.image_size / self.patch
    }

    /// Patches of one picture, without a class token.
    pub fn patches(&self) -> usize {
        self.side().pow(2)
    }

    /// Pixels `[batch, channels, image_size, image_size]` to `[batch, patches, hidden]`, without a bias.
    pub(super) fn patch_embedding<'g>(&self, embeddings: &Scope<'g>, pixels: Tensor<'g>) -> Tensor<'g> {
        let patches = embeddings.patches("patch_embedding", self.hidden, self.patch, pixels);
        let batch = patches.ty().shape[0];
        patches.reshape([batch, self.hidden.into(), self.patches().into()]).transpose(&[0, 2, 1])
    }

    /// Hidden states `[batch, tokens, hidden]`: entry 0 is x, the input of the first block, entry n the output of block n.
    /// Blocks after the last `wanted` entry are not written.
    pub(super) fn states<'g>(&self, s: &Scope<'g>, x: Tensor<'g>, wanted: usize) -> Vec<Tensor<'g>> {
        let mut states = vec![x];
        for layer in 0..wanted {
            states.push(self.block(&s.layer("encoder.layers", layer), states[layer]));
        }
        states
    }

    fn block<'g>(&self, s: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        self.block_with(s, x, |attn, heads, normed| {
            let [q, k, v] =
                ["q_proj", "k_proj", "v_proj"].map(|name| attn.linear(name, self.hidden).bias().column().of(normed));
            attn.linear("out_proj", self.hidden).bias().row().of(attn.attention(heads).of(q, k, v))
        })
    }

    /// A block whose attention, from the normed input to what is added to the input, is the family's own.
    pub(super) fn block_with<'g>(
        &self,
        s: &Scope<'g>,
        x: Tensor<'g>,
        attend: impl FnOnce(&Scope<'g>, Heads, Tensor<'g>) -> Tensor<'g>,
    ) -> Tensor<'g> {
        let (attn, mlp) = (s.sub("self_attn"), s.sub("mlp"));
        let normed = s.layer_norm("layer_norm1", self.epsilon).of(x);
        let x = x + attend(&attn, self.heads, normed);
        let normed = s.layer_norm("layer_norm2", self.epsilon).of(x);
        let wide = mlp.linear("fc1", self.ffn).bias().column().of(normed).activation(self.activation);
        x + mlp.linear("fc2", self.hidden).bias().row().of(wide)
    }
}
