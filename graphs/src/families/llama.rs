//! LLaMA, a decoder-only language model (Touvron et al. 2023, arXiv 2302.13971; grouped heads: 2307.09288).
//! Names and semantics of `transformers/models/llama/modeling_llama.py`.
use super::decoder::{Inputs, wanted};
use crate::config::Keys;
use crate::{
    ActivationKind, DType, DecoderFacts, Facts, Graph, GraphError, Heads, Logits, Positions, Rope, Scope, Tensor,
};

#[derive(Clone, Debug, PartialEq)]
pub struct Llama {
    pub vocab: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: Heads,
    pub epsilon: f32,
    pub activation: ActivationKind,
    pub max_positions: usize,
    pub rope: Rope,
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

impl Llama {
    /// Missing keys take the defaults of `LlamaConfig`, which hub files of LLaVA rely on.
    pub(crate) fn from_config(keys: &Keys) -> Result<Llama, GraphError> {
        let hidden = keys.size("hidden_size", 4096)?;
        let query = keys.size("num_attention_heads", 32)?;
        let key_value = keys.size("num_key_value_heads", query)?;
        if !query.is_multiple_of(key_value) {
            let reason = format!("{query} attention heads do not divide by {key_value} key/value heads");
            return Err(keys.fault("num_key_value_heads", reason));
        }
        if keys.get("head_dim").is_none() && !hidden.is_multiple_of(query) {
            let reason = format!("hidden_size {hidden} does not divide by {query} heads and there is no head_dim");
            return Err(keys.fault("num_attention_heads", reason));
        }
        let heads = Heads { query, key_value, dim: keys.size("head_dim", hidden / query)? };
        if !heads.dim.is_multiple_of(2) {
            return Err(keys.fault("head_dim", format!("rotary embedding needs an even size, found {}", heads.dim)));
        }
        let max_positions = keys.size("max_position_embeddings", 2048)?;
        Ok(Llama {
            vocab: keys.size("vocab_size", 32000)?,
            hidden,
            ffn: keys.size("intermediate_size", 11008)?,
            layers: keys.size("num_hidden_layers", 32)?,
            heads,
            epsilon: keys.positive("rms_norm_eps", 1e-6)?,
            activation: keys.activation("hidden_act", "silu")?,
            max_positions,
            rope: keys.rope(10000.0, max_positions)?,
            tied: keys.flag("tie_word_embeddings", false)?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
        })
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts {
            architecture: "LlamaForCausalLM",
            model_type: "llama",
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers,
            max_positions: self.max_positions,
            decoder_start_id: None,
            decoder: DecoderFacts {
                heads: self.heads,
                ffn: self.ffn,
                activation: self.activation,
                epsilon: self.epsilon,
                positions: Positions::Rotary { base: self.rope.theta },
            },
            pictures: None,
        }
    }

    /// The language network: ids (and, where `pictures`, the prompt table) in, logits float32 out.
    ///
    /// Inputs as [`Inputs`] has them, with [`Logits::Last`] also `last_token_ids`.
    /// Output: `logits` `[batch, vocab]`, or `[batch, tokens, vocab]` with [`Logits::All`].
    pub(crate) fn write(&self, graph: &Graph, root: &Scope<'_>, pictures: bool, logits: Logits) {
        let inputs = Inputs::new(graph);
        let model = root.sub("model");
        let mut x = inputs.embed(&model, "embed_tokens", self.vocab, self.hidden, pictures);
        for layer in 0..self.layers {
            x = self.layer(&model.layer("layers", layer), x, layer, inputs);
        }
        x = wanted(graph, x, logits);
        let mut head = root.linear("lm_head", self.vocab).vocab();
        if self.tied {
            head = head.tied_to(model.name("embed_tokens.weight"));
        }
        let normed = model.rms_norm("norm", self.epsilon).of(x);
        graph.output("logits", head.of(normed).cast(DType::Float32));
    }

    fn layer<'g>(&self, s: &Scope<'g>, x: Tensor<'g>, layer: usize, inputs: Inputs<'g>) -> Tensor<'g> {
        let (attn, mlp, heads) = (s.sub("self_attn"), s.sub("mlp"), self.heads);
        let normed = s.rms_norm("input_layernorm", self.epsilon).of(x);
        let project =
            |name, heads| attn.linear(name, heads * self.heads.dim).bias_if(self.attention_bias).column().of(normed);
        let (q, k, v) =
            (project("q_proj", heads.query), project("k_proj", heads.key_value), project("v_proj", heads.key_value));
        let attention = attn.attention(heads).causal().rope(&self.rope, inputs.position_ids);
        let mixed = attention.cached(layer, inputs.cache).of(q, k, v);
        let x = x + attn.linear("o_proj", self.hidden).bias_if(self.attention_bias).row().of(mixed);
        let normed = s.rms_norm("post_attention_layernorm", self.epsilon).of(x);
        let wide = |name| mlp.linear(name, self.ffn).bias_if(self.mlp_bias).column().of(normed);
        let gated = wide("gate_proj").activation(self.activation) * wide("up_proj");
        x + mlp.linear("down_proj", self.hidden).bias_if(self.mlp_bias).row().of(gated)
    }
}
