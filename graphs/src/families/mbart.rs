//! mBART, an encoder-decoder language model (Liu et al. 2020, arXiv 2001.08210), and its decoder behind another encoder.
//! Names and semantics of `transformers/models/mbart/modeling_mbart.py`.
use super::cross::{self, Source};
use super::decoder::{EPSILON, Inputs, OFFSET, lengths, tokens, wanted};
use crate::config::Keys;
use crate::models::Alias;
use crate::{
    ActivationKind, Axis, DType, DecoderFacts, Dim, Facts, Graph, GraphError, Heads, Logits, Network, Positions, Scope,
    Tensor,
};

#[derive(Clone, Debug, PartialEq)]
pub struct Mbart {
    pub vocab: usize,
    pub hidden: usize,
    /// Of the decoder.
    pub stack: Stack,
    /// What reads text, where the model has it.
    pub encoder: Option<Stack>,
    pub activation: ActivationKind,
    /// Embeddings are multiplied by hidden^0.5.
    pub scaled_embedding: bool,
    pub max_positions: usize,
    /// What the decoder starts with.
    pub start_id: usize,
}

/// Sizes of the encoder or the decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    pub layers: usize,
    pub ffn: usize,
    pub heads: Heads,
}

impl Mbart {
    /// A file without a head has it in the embedding; the stacks' own embeddings repeat the shared one.
    pub(crate) const ALIASES: &'static [Alias] = &[
        ("lm_head.", "model.shared."),
        ("lm_head.", "model.decoder.embed_tokens."),
        ("model.shared.", "model.encoder.embed_tokens."),
        ("model.shared.", "model.decoder.embed_tokens."),
    ];

    /// Copies of the embedding, and in a decoder alone the attention to an encoder that it does not have.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        match self.encoder {
            Some(_) => name.ends_with("coder.embed_tokens.weight"),
            None => name.contains(".encoder_attn"),
        }
    }

    /// Missing keys take the defaults of `MBartConfig`; `text` is whether there is an encoder of text.
    pub(crate) fn from_config(keys: &Keys, text: bool) -> Result<Mbart, GraphError> {
        let hidden = keys.size("d_model", 1024)?;
        let stack = |kind: &str| {
            Ok(Stack {
                layers: keys.size(&format!("{kind}_layers"), 12)?,
                ffn: keys.size(&format!("{kind}_ffn_dim"), 4096)?,
                heads: keys.heads(&format!("{kind}_attention_heads"), 16, "d_model", hidden)?,
            })
        };
        Ok(Mbart {
            vocab: keys.size("vocab_size", 50265)?,
            hidden,
            stack: stack("decoder")?,
            encoder: if text { Some(stack("encoder")?) } else { None },
            activation: keys.activation("activation_function", "gelu")?,
            scaled_embedding: keys.flag("scale_embedding", false)?,
            max_positions: keys.size("max_position_embeddings", 1024)?,
            start_id: Self::start_id(keys, keys)?,
        })
    }

    /// Of the whole model's config, else of the decoder's; transformers falls back to the token that begins a text.
    pub(crate) fn start_id(whole: &Keys, own: &Keys) -> Result<usize, GraphError> {
        for (keys, key) in [(whole, "decoder_start_token_id"), (own, "decoder_start_token_id"), (own, "bos_token_id")] {
            if let Some(id) = keys.token(key)? {
                return Ok(id);
            }
        }
        Ok(0)
    }

    pub(crate) fn facts(&self) -> Facts {
        let Mbart { vocab, hidden, stack: Stack { layers, ffn, heads }, activation, .. } = *self;
        Facts {
            architecture: if self.encoder.is_some() { "MBartForConditionalGeneration" } else { "MBartForCausalLM" },
            model_type: "mbart",
            vocab,
            hidden,
            layers,
            max_positions: self.max_positions,
            decoder_start_id: self.encoder.as_ref().map(|_| self.start_id),
            decoder: DecoderFacts { heads, ffn, activation, epsilon: EPSILON, positions: Positions::Learned },
            pictures: None,
        }
    }

    /// The model by itself: `encoder`, `cross` and `decoder` as T5 has them, or `language` without an encoder.
    pub(crate) fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, GraphError> {
        match &self.encoder {
            Some(encoder) => Ok(vec![
                self.encoder(encoder, dtype)?,
                self.cross(dtype, "", Axis::Source.into())?,
                self.decoder(dtype, "", Axis::Source.into(), logits)?,
            ]),
            None => {
                let graph = Graph::new("language", dtype);
                self.write(&graph, &graph.scope(""), None, logits);
                Ok(vec![graph.finish()?])
            }
        }
    }

    /// `encoder`: `input_ids` and `position_ids` int32 `[batch, source]`, `source_lengths` int32 `[batch]` to
    /// `encoder_output` `[batch, source, hidden]`.
    fn encoder(&self, stack: &Stack, dtype: DType) -> Result<Network, GraphError> {
        let graph = Graph::new("encoder", dtype);
        let root = graph.scope("");
        let [ids, position_ids] = ["input_ids", "position_ids"].map(|name| tokens(&graph, name, Axis::Source));
        let lengths = lengths(&graph, "source_lengths");
        let s = root.sub("model.encoder");
        let mut x = self.enter(&s, root.embed("model.shared", self.vocab, self.hidden, ids), position_ids);
        for layer in 0..stack.layers {
            let s = s.layer("layers", layer);
            x = self.attend(&s, "self_attn", x, |attn, normed| {
                let [q, k, v] = self.project(attn, ["q_proj", "k_proj", "v_proj"], normed);
                attn.attention(stack.heads).key_lengths(lengths).of(q, k, v)
            });
            x = self.feed_forward(&s, stack.ffn, x);
        }
        graph.output("encoder_output", s.layer_norm("layer_norm", EPSILON).of(x));
        graph.finish()
    }

    /// `cross`: `encoder_output` `[batch, source, hidden]` to `cross_key_N` and `cross_value_N` of every decoder layer.
    pub(crate) fn cross(&self, dtype: DType, prefix: &str, source: Dim) -> Result<Network, GraphError> {
        cross::network(dtype, [source, self.hidden.into()], self.stack.layers, |graph, layer, x| {
            let attn = graph.scope(prefix).sub("model.decoder").layer("layers", layer).sub("encoder_attn");
            self.project(&attn, ["k_proj", "v_proj"], x)
        })
    }

    /// `decoder`: inputs as [`Inputs`] has them, what `cross` gave and, where texts of different lengths were read,
    /// `source_lengths` int32 `[batch]`, to `logits` float32 `[batch, vocab]` (with [`Logits::All`] of every token).
    pub(crate) fn decoder(&self, dtype: DType, prefix: &str, size: Dim, logits: Logits) -> Result<Network, GraphError> {
        let graph = Graph::new("decoder", dtype);
        self.write(&graph, &graph.scope(prefix), Some(Source::new(&graph, size, self.hidden)), logits);
        graph.finish()
    }

    fn write<'g>(&self, graph: &'g Graph, root: &Scope<'g>, source: Option<Source<'g>>, logits: Logits) {
        let (inputs, s) = (Inputs::new(graph), root.sub("model.decoder"));
        let shared = if self.encoder.is_some() { "model.shared" } else { "model.decoder.embed_tokens" };
        let mut x = self.enter(&s, inputs.embed(root, shared, self.vocab, self.hidden, false), inputs.position_ids);
        for layer in 0..self.stack.layers {
            let s = s.layer("layers", layer);
            x = self.attend(&s, "self_attn", x, |attn, normed| {
                let [q, k, v] = self.project(attn, ["q_proj", "k_proj", "v_proj"], normed);
                attn.attention(self.stack.heads).causal().cached(layer, inputs.cache).of(q, k, v)
            });
            if let Some(source) = source {
                x = self.attend(&s, "encoder_attn", x, |attn, normed| {
                    let ([q], [key, value]) = (self.project(attn, ["q_proj"], normed), source.read(layer));
                    source.within(attn.attention(self.stack.heads)).of(q, key, value)
                });
            }
            x = self.feed_forward(&s, self.stack.ffn, x);
        }
        let x = s.layer_norm("layer_norm", EPSILON).of(wanted(graph, x, logits));
        // A file without a head has it in the embedding: an alias.
        let mut y = root.linear("lm_head", self.vocab).vocab().of(x);
        if self.encoder.is_some() {
            y = root.add_parameter("final_logits_bias", &[1, self.vocab], y);
        }
        graph.output("logits", y.cast(DType::Float32));
    }

    /// Embedded tokens with their positions, normed.
    fn enter<'g>(&self, s: &Scope<'g>, embedded: Tensor<'g>, position_ids: Tensor<'g>) -> Tensor<'g> {
        let x = if self.scaled_embedding { embedded.scaled((self.hidden as f32).sqrt()) } else { embedded };
        let positions = s.positions("embed_positions", OFFSET, self.max_positions, self.hidden, position_ids);
        s.layer_norm("layernorm_embedding", EPSILON).of(x + positions)
    }

    fn project<'g, const N: usize>(&self, attn: &Scope<'g>, names: [&str; N], x: Tensor<'g>) -> [Tensor<'g>; N] {
        names.map(|name| attn.linear(name, self.hidden).bias().column().of(x))
    }

    /// x plus what `mix` makes of its norm.
    fn attend<'g>(
        &self,
        s: &Scope<'g>,
        name: &str,
        x: Tensor<'g>,
        mix: impl FnOnce(&Scope<'g>, Tensor<'g>) -> Tensor<'g>,
    ) -> Tensor<'g> {
        let attn = s.sub(name);
        let mixed = mix(&attn, s.layer_norm(&format!("{name}_layer_norm"), EPSILON).of(x));
        x + attn.linear("out_proj", self.hidden).bias().row().of(mixed)
    }

    fn feed_forward<'g>(&self, s: &Scope<'g>, ffn: usize, x: Tensor<'g>) -> Tensor<'g> {
        let normed = s.layer_norm("final_layer_norm", EPSILON).of(x);
        let wide = s.linear("fc1", ffn).bias().column().of(normed).activation(self.activation);
        x + s.linear("fc2", self.hidden).bias().row().of(wide)
    }
}
