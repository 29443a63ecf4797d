//! T5, an encoder-decoder language model (Raffel et al. 2020, arXiv 1910.10683; FLAN: Chung et al. 2022, 2210.11416).
//! Names and semantics of `transformers/models/t5/modeling_t5.py`.
use super::cross::{self, Source};
use super::decoder;
use crate::config::Keys;
use crate::models::Alias;
use crate::{
    ActivationKind, AttentionLayer, Axis, DType, DecoderFacts, Facts, Graph, GraphError, Heads, Logits, Network,
    Positions, RelativeBias, Scope, Tensor, Weight,
};

/// Distances have no end of their own; this bounds what is asked for.
const POSITIONS: usize = 4096;

/// Trained models leave float16's range in what `wo` gives and in the residual stream (Hugging Face keeps `wo`, and with it
/// the stream, in float32). A float16 network computes `wo` at this fraction, a power of two, and adds up in float32.
const FRACTION: f32 = 1.0 / 32.0;

#[derive(Clone, Debug, PartialEq)]
pub struct T5 {
    pub vocab: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub encoder_layers: usize,
    pub layers: usize,
    pub heads: Heads,
    pub epsilon: f32,
    pub activation: ActivationKind,
    /// Two input matrices, one through the activation, multiplied.
    pub gated: bool,
    pub buckets: usize,
    pub max_distance: usize,
    /// The head sees its input times hidden^-0.5.
    pub scaled_head: bool,
    /// What the decoder starts with.
    pub start_id: usize,
}

impl T5 {
    /// A file without a head has it in the embedding; the stacks' own embeddings repeat the shared one.
    pub(crate) const ALIASES: &'static [Alias] =
        &[("lm_head.", "shared."), ("shared.", "encoder.embed_tokens."), ("shared.", "decoder.embed_tokens.")];

    /// Copies of the embedding that older files hold.
    pub(crate) fn ignores(name: &str) -> bool {
        name.ends_with("encoder.embed_tokens.weight") || name.ends_with("decoder.embed_tokens.weight")
    }

    /// Missing keys take the defaults of `T5Config`.
    pub(crate) fn from_config(keys: &Keys) -> Result<T5, GraphError> {
        let heads = keys.size("num_heads", 8)?;
        let encoder_layers = keys.size("num_layers", 6)?;
        let (gated, activation) = keys.gated_activation("feed_forward_proj", "relu")?;
        let buckets = keys.size("relative_attention_num_buckets", 32)?;
        let max_distance = keys.size("relative_attention_max_distance", 128)?;
        if buckets < 4 || max_distance <= buckets / 2 {
            let reason = format!("{buckets} buckets do not reach to a distance of {max_distance}");
            return Err(keys.fault("relative_attention_num_buckets", reason));
        }
        let tied = keys.flag("tie_word_embeddings", true)?;
        Ok(T5 {
            vocab: keys.size("vocab_size", 32128)?,
            hidden: keys.size("d_model", 512)?,
            ffn: keys.size("d_ff", 2048)?,
            encoder_layers,
            layers: keys.size("num_decoder_layers", encoder_layers)?,
            heads: Heads { query: heads, key_value: heads, dim: keys.size("d_kv", 64)? },
            epsilon: keys.positive("layer_norm_epsilon", 1e-6)?,
            activation,
            gated,
            buckets,
            max_distance,
            // transformers 5 says so by a key of its own, 4 by an untied head.
            scaled_head: tied && keys.flag("scale_decoder_outputs", true)?,
            start_id: keys.token("decoder_start_token_id")?.unwrap_or(0),
        })
    }

    pub(crate) fn facts(&self) -> Facts {
        let T5 { vocab, hidden, layers, heads, ffn, activation, epsilon, .. } = *self;
        Facts {
            architecture: "T5ForConditionalGeneration",
            model_type: "t5",
            vocab,
            hidden,
            layers,
            max_positions: POSITIONS,
            decoder_start_id: Some(self.start_id),
            decoder: DecoderFacts { heads, ffn, activation, epsilon, positions: Positions::Relative },
            pictures: None,
        }
    }

    /// In the order in which they run; features of pictures go to the encoder.
    pub(crate) fn networks(
        &self,
        dtype: DType,
        prefix: &str,
        pictures: bool,
        logits: Logits,
    ) -> Result<Vec<Network>, GraphError> {
        Ok(vec![
            self.encoder(dtype, prefix, pictures)?,
            self.cross(dtype, prefix)?,
            self.decoder(dtype, prefix, logits)?,
        ])
    }

    /// `encoder`: `input_ids` int32 `[batch, source]`, `source_lengths` int32 `[batch]` and, where `pictures`, the
    /// `prompt_embedding_table` `[features, hidden]` to `encoder_output` `[batch, source, hidden]`.
    fn encoder(&self, dtype: DType, prefix: &str, pictures: bool) -> Result<Network, GraphError> {
        let graph = Graph::new("encoder", dtype);
        let root = graph.scope(prefix);
        let ids = decoder::tokens(&graph, "input_ids", Axis::Source);
        let lengths = decoder::lengths(&graph, "source_lengths");
        let mut x = residual(decoder::embed(&root, "shared", [self.vocab, self.hidden], ids, pictures));
        let stack = root.sub("encoder");
        let bias = self.relative_bias(&stack, true);
        for layer in 0..self.encoder_layers {
            let block = stack.layer("block", layer);
            let (attn, normed) = self.enter(&block.layer("layer", 0), "SelfAttention", x);
            let [q, k, v] = self.project(&attn, ["q", "k", "v"], normed);
            let mixed = self.attention(&attn).relative_bias(bias.clone()).key_lengths(lengths).of(q, k, v);
            x = x + self.leave(&attn, mixed);
            x = x + self.feed_forward(&block.layer("layer", 1), x);
        }
        graph.output("encoder_output", stack.rms_norm("final_layer_norm", self.epsilon).of(x).cast(dtype));
        graph.finish()
    }

    /// `cross`: `encoder_output` to the keys and values that every decoder layer reads of it, `cross_key_N` and
    /// `cross_value_N` `[batch, source, heads * dim]`.
    fn cross(&self, dtype: DType, prefix: &str) -> Result<Network, GraphError> {
        cross::network(dtype, [Axis::Source.into(), self.hidden.into()], self.layers, |graph, layer, x| {
            let block = graph.scope(prefix).sub("decoder").layer("block", layer);
            let attn = block.layer("layer", 1).sub("EncDecAttention");
            self.project(&attn, ["k", "v"], x)
        })
    }

    /// `decoder`: `input_ids` int32 `[batch, tokens]`, `past_lengths`, `sequence_lengths`, `source_lengths` and, with
    /// [`Logits::Last`], `last_token_ids` int32 `[batch]`, and what `cross` gave, to `logits` float32 `[batch, vocab]`
    /// (`[batch, tokens, vocab]` with [`Logits::All`]).
    fn decoder(&self, dtype: DType, prefix: &str, logits: Logits) -> Result<Network, GraphError> {
        let graph = Graph::new("decoder", dtype);
        let root = graph.scope(prefix);
        let (ids, cache) = (decoder::tokens(&graph, "input_ids", Axis::Tokens), decoder::cache(&graph));
        let source = Source::new(&graph, Axis::Source.into(), self.heads.query * self.heads.dim);
        let mut x = residual(decoder::embed(&root, "shared", [self.vocab, self.hidden], ids, false));
        let stack = root.sub("decoder");
        let bias = self.relative_bias(&stack, false);
        for layer in 0..self.layers {
            let block = stack.layer("block", layer);
            let (attn, normed) = self.enter(&block.layer("layer", 0), "SelfAttention", x);
            let [q, k, v] = self.project(&attn, ["q", "k", "v"], normed);
            let own = self.attention(&attn).causal().relative_bias(bias.clone()).cached(layer, cache);
            x = x + self.leave(&attn, own.of(q, k, v));
            let (attn, normed) = self.enter(&block.layer("layer", 1), "EncDecAttention", x);
            let ([key, value], [q]) = (source.read(layer), self.project(&attn, ["q"], normed));
            x = x + self.leave(&attn, source.within(self.attention(&attn)).of(q, key, value));
            x = x + self.feed_forward(&block.layer("layer", 2), x);
        }
        let x = decoder::wanted(&graph, x, logits);
        let mut x = stack.rms_norm("final_layer_norm", self.epsilon).of(x).cast(dtype);
        if self.scaled_head {
            x = x.scaled((self.hidden as f32).powf(-0.5));
        }
        // A file without a head has it in the embedding: an alias.
        graph.output("logits", root.linear("lm_head", self.vocab).vocab().of(x).cast(DType::Float32));
        graph.finish()
    }

    /// Of the first block, read by all.
    fn relative_bias(&self, stack: &Scope<'_>, bidirectional: bool) -> RelativeBias {
        let T5 { buckets, max_distance, heads, .. } = *self;
        let name = stack.name("block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let weight = Weight::tensor(name, &[buckets, heads.query]);
        RelativeBias { weight, buckets, max_distance, bidirectional }
    }

    /// A sub-layer's scope and its normed input, in the network's type again.
    fn enter<'g>(&self, layer: &Scope<'g>, name: &str, x: Tensor<'g>) -> (Scope<'g>, Tensor<'g>) {
        (layer.sub(name), layer.rms_norm("layer_norm", self.epsilon).of(x).cast(layer.dtype()))
    }

    fn attention<'g>(&self, attn: &Scope<'g>) -> AttentionLayer<'g> {
        attn.attention(self.heads).scale(1.0)
    }

    fn project<'g, const N: usize>(&self, attn: &Scope<'g>, names: [&str; N], x: Tensor<'g>) -> [Tensor<'g>; N] {
        names.map(|name| attn.linear(name, self.heads.query * self.heads.dim).column().of(x))
    }

    fn leave<'g>(&self, attn: &Scope<'g>, mixed: Tensor<'g>) -> Tensor<'g> {
        residual(attn.linear("o", self.hidden).row().of(mixed))
    }

    fn feed_forward<'g>(&self, layer: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let (dense, normed) = self.enter(layer, "DenseReluDense", x);
        let narrow = layer.dtype() == DType::Float16;
        let reduced = |x: Tensor<'g>| if narrow { x.scaled(FRACTION) } else { x };
        let wide = |name| dense.linear(name, self.ffn).column().of(normed);
        let inner = if self.gated {
            wide("wi_0").activation(self.activation) * reduced(wide("wi_1"))
        } else {
            reduced(wide("wi").activation(self.activation))
        };
        let outer = residual(dense.linear("wo", self.hidden).row().of(inner));
        if narrow { outer.scaled(FRACTION.recip()) } else { outer }
    }
}

/// In the type of the residual stream: float32 in place of float16.
fn residual(x: Tensor<'_>) -> Tensor<'_> {
    if x.ty().dtype == DType::Float16 { x.cast(DType::Float32) } else { x }
}
