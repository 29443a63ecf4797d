//! T5, an encoder-decoder language model (Raffel et al. 2020, arXiv 1910.10683; FLAN: Chung et al. 2022, 2210.11416).
//! Names and semantics of `transformers/models/t5/modeling_t5.py`.
use crate::config::Keys;
use crate::models::Alias;
use crate::{
    ActivationKind, Axis, CacheInputs, DType, DecoderFacts, Facts, Graph, GraphError, Heads, Logits, Network,
    Positions, RelativeBias, Scope, Tensor, Type, Weight,
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
        let projection = keys.text("feed_forward_proj", "relu")?;
        let (gated, name) = match projection.strip_prefix("gated-") {
            // What is called gelu there is its tanh form.
            Some("gelu") => (true, "gelu_new"),
            Some(name) => (true, name),
            None => (false, projection),
        };
        let activation = ActivationKind::from_config(name)
            .ok_or_else(|| keys.fault("feed_forward_proj", format!("`{projection}` is not supported")))?;
        let (buckets, max_distance) =
            (keys.size("relative_attention_num_buckets", 32)?, keys.size("relative_attention_max_distance", 128)?);
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
            start_id: usize::try_from(keys.integer("decoder_start_token_id")?.unwrap_or(0))
                .map_err(|_| keys.fault("decoder_start_token_id", "a token's id is not below 0".into()))?,
        })
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts {
            architecture: "T5ForConditionalGeneration",
            model_type: "t5",
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers,
            max_positions: POSITIONS,
            decoder_start_id: Some(self.start_id),
            decoder: DecoderFacts {
                heads: self.heads,
                ffn: self.ffn,
                activation: self.activation,
                epsilon: self.epsilon,
                positions: Positions::Relative,
            },
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
        let ids = graph.input("input_ids", Type::new(DType::Int32, [Axis::Batch.into(), Axis::Source.into()]));
        let lengths = graph.input("source_lengths", Type::new(DType::Int32, [Axis::Batch.into()]));
        let mut x = root.embed("shared", self.vocab, self.hidden, ids);
        if pictures {
            let table = Type::new(dtype, [Axis::Features.into(), self.hidden.into()]);
            x = x.splice(ids, graph.input("prompt_embedding_table", table), self.vocab);
        }
        let mut x = residual(x);
        let stack = root.sub("encoder");
        let bias = self.relative_bias(&stack, true);
        for layer in 0..self.encoder_layers {
            let block = stack.layer("block", layer);
            let (attn, normed) = self.enter(&block.layer("layer", 0), "SelfAttention", x);
            let [q, k, v] = ["q", "k", "v"].map(|name| self.project(&attn, name, normed));
            let mixed = attn.attention(self.heads).scale(1.0).relative_bias(bias.clone()).key_lengths(lengths);
            x = x + residual(attn.linear("o", self.hidden).row().of(mixed.of(q, k, v)));
            x = x + self.feed_forward(&block.layer("layer", 1), x);
        }
        graph.output("encoder_output", stack.rms_norm("final_layer_norm", self.epsilon).of(x).cast(dtype));
        graph.finish()
    }

    /// `cross`: `encoder_output` to the keys and values that every decoder layer reads of it, `cross_key_N` and
    /// `cross_value_N` `[batch, source, heads * dim]`.
    fn cross(&self, dtype: DType, prefix: &str) -> Result<Network, GraphError> {
        let graph = Graph::new("cross", dtype);
        let shape = [Axis::Batch.into(), Axis::Source.into(), self.hidden.into()];
        let x = graph.input("encoder_output", Type::new(dtype, shape));
        for layer in 0..self.layers {
            let attn =
                graph.scope(prefix).sub("decoder").layer("block", layer).layer("layer", 1).sub("EncDecAttention");
            graph.output(&format!("cross_key_{layer}"), self.project(&attn, "k", x));
            graph.output(&format!("cross_value_{layer}"), self.project(&attn, "v", x));
        }
        graph.finish()
    }

    /// `decoder`: `input_ids` int32 `[batch, tokens]`, `past_lengths`, `sequence_lengths`, `source_lengths` and, with
    /// [`Logits::Last`], `last_token_ids` int32 `[batch]`, and what `cross` gave, to `logits` float32 `[batch, vocab]`
    /// (`[batch, tokens, vocab]` with [`Logits::All`]).
    fn decoder(&self, dtype: DType, prefix: &str, logits: Logits) -> Result<Network, GraphError> {
        let graph = Graph::new("decoder", dtype);
        let root = graph.scope(prefix);
        let ids = graph.input("input_ids", Type::new(DType::Int32, [Axis::Batch.into(), Axis::Tokens.into()]));
        let lengths = |name| graph.input(name, Type::new(DType::Int32, [Axis::Batch.into()]));
        let cache =
            CacheInputs { past_lengths: lengths("past_lengths"), sequence_lengths: lengths("sequence_lengths") };
        let source_lengths = lengths("source_lengths");
        let mut x = residual(root.embed("shared", self.vocab, self.hidden, ids));
        let stack = root.sub("decoder");
        let bias = self.relative_bias(&stack, false);
        for layer in 0..self.layers {
            let block = stack.layer("block", layer);
            let (attn, normed) = self.enter(&block.layer("layer", 0), "SelfAttention", x);
            let [q, k, v] = ["q", "k", "v"].map(|name| self.project(&attn, name, normed));
            let own = attn.attention(self.heads).causal().scale(1.0).relative_bias(bias.clone()).cached(layer, cache);
            x = x + residual(attn.linear("o", self.hidden).row().of(own.of(q, k, v)));
            let (attn, normed) = self.enter(&block.layer("layer", 1), "EncDecAttention", x);
            let shape = [Axis::Batch.into(), Axis::Source.into(), (self.heads.query * self.heads.dim).into()];
            let [key, value] =
                ["key", "value"].map(|kind| graph.input(&format!("cross_{kind}_{layer}"), Type::new(dtype, shape)));
            let cross = attn.attention(self.heads).scale(1.0).key_lengths(source_lengths);
            let mixed = cross.of(self.project(&attn, "q", normed), key, value);
            x = x + residual(attn.linear("o", self.hidden).row().of(mixed));
            x = x + self.feed_forward(&block.layer("layer", 2), x);
        }
        if logits == Logits::Last {
            x = x.last_token(lengths("last_token_ids"));
        }
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
        let name = stack.name("block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        RelativeBias {
            weight: Weight::tensor(name, &[self.buckets, self.heads.query]),
            buckets: self.buckets,
            max_distance: self.max_distance,
            bidirectional,
        }
    }

    /// A sub-layer's scope and its normed input, in the network's type again.
    fn enter<'g>(&self, layer: &Scope<'g>, name: &str, x: Tensor<'g>) -> (Scope<'g>, Tensor<'g>) {
        (layer.sub(name), layer.rms_norm("layer_norm", self.epsilon).of(x).cast(layer.dtype()))
    }

    fn project<'g>(&self, attn: &Scope<'g>, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        attn.linear(name, self.heads.query * self.heads.dim).column().of(x)
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
