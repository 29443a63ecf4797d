//! The querying transformer of BLIP-2, on its query tokens alone (Li et al. 2023, arXiv 2301.12597).
//! Names and semantics of `Blip2QFormerModel` in `transformers/models/blip_2/modeling_blip_2.py`.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Heads, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Qformer {
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: Heads,
    /// Every how many layers, from the first on, look at the picture.
    pub frequency: usize,
    /// Width of the picture's features.
    pub picture: usize,
    pub activation: ActivationKind,
    pub epsilon: f32,
}

impl Qformer {
    pub(crate) fn from_config(keys: &Keys) -> Result<Qformer, GraphError> {
        let hidden = keys.size("hidden_size", 768)?;
        let qformer = Qformer {
            hidden,
            ffn: keys.size("intermediate_size", 3072)?,
            layers: keys.size("num_hidden_layers", 12)?,
            heads: keys.heads("num_attention_heads", 12, "hidden_size", hidden)?,
            frequency: keys.size("cross_attention_frequency", 2)?,
            picture: keys.size("encoder_hidden_size", 1408)?,
            activation: keys.activation("hidden_act", "gelu")?,
            epsilon: keys.positive("layer_norm_eps", 1e-12)?,
        };
        if keys.flag("use_qformer_text_input", false)? {
            return Err(keys.fault("use_qformer_text_input", "text beside the query tokens is not supported".into()));
        }
        Ok(qformer)
    }

    /// Query tokens `[batch, queries, hidden]` and the picture `[batch, tokens, picture]` to `[batch, queries, hidden]`.
    pub(crate) fn write<'g>(&self, s: &Scope<'g>, queries: Tensor<'g>, picture: Tensor<'g>) -> Tensor<'g> {
        let mut x = s.layer_norm("layernorm", self.epsilon).of(queries);
        for layer in 0..self.layers {
            let s = s.layer("encoder.layer", layer);
            x = self.attend(&s.sub("attention"), x, x);
            if layer.is_multiple_of(self.frequency) {
                x = self.attend(&s.sub("crossattention"), x, picture);
            }
            let wide = s.linear("intermediate_query.dense", self.ffn).bias().column().of(x);
            x = self.output(&s.sub("output_query"), wide.activation(self.activation), x);
        }
        x
    }

    fn attend<'g>(&self, s: &Scope<'g>, x: Tensor<'g>, seen: Tensor<'g>) -> Tensor<'g> {
        let own = s.sub("attention");
        let project = |name, x| own.linear(name, self.hidden).bias().column().of(x);
        let (q, k, v) = (project("query", x), project("key", seen), project("value", seen));
        self.output(&s.sub("output"), own.attention(self.heads).of(q, k, v), x)
    }

    /// The norm comes behind the sum, as in BERT.
    fn output<'g>(&self, s: &Scope<'g>, y: Tensor<'g>, x: Tensor<'g>) -> Tensor<'g> {
        s.layer_norm("LayerNorm", self.epsilon).of(s.linear("dense", self.hidden).bias().row().of(y) + x)
    }

    /// Whether a tensor belongs to the part that reads text, which older files hold too: `name` within the Q-Former.
    pub(crate) fn ignores(name: &str) -> bool {
        let layer = name.strip_prefix("encoder.layer.").and_then(|rest| rest.split_once('.'));
        name.starts_with("embeddings.")
            || layer.is_some_and(|(_, rest)| rest.starts_with("intermediate.") || rest.starts_with("output."))
    }
}
