//! OPT, a decoder-only language model with learned positions (Zhang et al. 2022, arXiv 2205.01068).
//! Names and semantics of `transformers/models/opt/modeling_opt.py`.
use super::decoder::{EPSILON, Inputs, OFFSET, wanted};
use crate::config::Keys;
use crate::{ActivationKind, DType, DecoderFacts, Facts, Graph, GraphError, Heads, Logits, Positions, Scope, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub struct Opt {
    pub vocab: usize,
    pub hidden: usize,
    /// Width of the token embedding; where it is not `hidden` (350m), matrices lead in and out.
    pub embedding: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: Heads,
    pub activation: ActivationKind,
    pub max_positions: usize,
    /// Norms before the layers' parts, not behind them (350m).
    pub norm_first: bool,
    pub final_norm: bool,
    pub bias: bool,
    pub tied: bool,
}

impl Opt {
    /// Missing keys take the defaults of `OPTConfig`.
    pub(crate) fn from_config(keys: &Keys) -> Result<Opt, GraphError> {
        let hidden = keys.size("hidden_size", 768)?;
        let heads = keys.heads("num_attention_heads", 12, "hidden_size", hidden)?;
        if !keys.flag("layer_norm_elementwise_affine", true)? {
            return Err(keys.fault("layer_norm_elementwise_affine", "norms without weights are not supported".into()));
        }
        let norm_first = keys.flag("do_layer_norm_before", true)?;
        Ok(Opt {
            vocab: keys.size("vocab_size", 50272)?,
            hidden,
            embedding: keys.size("word_embed_proj_dim", hidden)?,
            ffn: keys.size("ffn_dim", 3072)?,
            layers: keys.size("num_hidden_layers", 12)?,
            heads,
            activation: keys.activation("activation_function", "relu")?,
            max_positions: keys.size("max_position_embeddings", 2048)?,
            norm_first,
            final_norm: norm_first && !keys.flag("_remove_final_layer_norm", false)?,
            bias: keys.flag("enable_bias", true)?,
            tied: keys.flag("tie_word_embeddings", true)?,
        })
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts {
            architecture: "OPTForCausalLM",
            model_type: "opt",
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers,
            max_positions: self.max_positions,
            decoder_start_id: None,
            decoder: DecoderFacts {
                heads: self.heads,
                ffn: self.ffn,
                activation: self.activation,
                epsilon: EPSILON,
                positions: Positions::Learned,
            },
            pictures: None,
        }
    }

    /// The language network: ids (and, where `pictures`, the prompt table) in, logits float32 out.
    ///
    /// Inputs as [`Inputs`] has them, with [`Logits::Last`] also `last_token_ids`; positions count from 0.
    /// Output: `logits` `[batch, vocab]`, or `[batch, tokens, vocab]` with [`Logits::All`].
    pub(crate) fn write(&self, graph: &Graph, root: &Scope<'_>, pictures: bool, logits: Logits) {
        let inputs = Inputs::new(graph);
        let decoder = root.sub("model.decoder");
        let narrow = self.embedding != self.hidden;
        let mut x = inputs.embed(&decoder, "embed_tokens", self.vocab, self.embedding, pictures);
        if narrow {
            x = decoder.linear("project_in", self.hidden).of(x);
        }
        x = x + decoder.positions("embed_positions", OFFSET, self.max_positions, self.hidden, inputs.position_ids);
        for layer in 0..self.layers {
            x = self.layer(&decoder.layer("layers", layer), x, layer, inputs);
        }
        x = wanted(graph, x, logits);
        if self.final_norm {
            x = decoder.layer_norm("final_layer_norm", EPSILON).of(x);
        }
        if narrow {
            x = decoder.linear("project_out", self.embedding).of(x);
        }
        let mut head = root.linear("lm_head", self.vocab).vocab();
        if self.tied {
            head = head.tied_to(decoder.name("embed_tokens.weight"));
        }
        graph.output("logits", head.of(x).cast(DType::Float32));
    }

    fn layer<'g>(&self, s: &Scope<'g>, x: Tensor<'g>, layer: usize, inputs: Inputs<'g>) -> Tensor<'g> {
        let attn = s.sub("self_attn");
        let norm = |name: &str, wanted: bool, x| if wanted { s.layer_norm(name, EPSILON).of(x) } else { x };
        let normed = norm("self_attn_layer_norm", self.norm_first, x);
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"]
            .map(|name| attn.linear(name, self.hidden).bias_if(self.bias).column().of(normed));
        let mixed = attn.attention(self.heads).causal().cached(layer, inputs.cache).of(q, k, v);
        let x = x + attn.linear("out_proj", self.hidden).bias_if(self.bias).row().of(mixed);
        let x = norm("self_attn_layer_norm", !self.norm_first, x);
        let normed = norm("final_layer_norm", self.norm_first, x);
        let wide = s.linear("fc1", self.ffn).bias_if(self.bias).column().of(normed).activation(self.activation);
        let x = x + s.linear("fc2", self.hidden).bias_if(self.bias).row().of(wide);
        norm("final_layer_norm", !self.norm_first, x)
    }
}
