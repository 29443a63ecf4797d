//! Tables of the decoder-only families. A trap in LLaMA's: `mlp.fc` is `gate_proj`, the matrix before the activation, and
//! `mlp.gate` is `up_proj`.
use super::layout::{Field, Form, Split, Table};
use graphs::families::llama::Llama;
use graphs::families::opt::Opt;

const LAYERS: &str = "transformer.layers";
/// Hugging Face's position tables begin two rows before that of position 0.
pub(super) const OFFSET: usize = 2;

pub(super) fn llama(llama: &Llama, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    let (heads, ffn) = (llama.heads, llama.ffn);
    table.tensor("transformer.vocab_embedding.weight", "model.embed_tokens.weight", llama.vocab, embedding, Form::Same);
    for layer in 0..llama.layers {
        let (to, from) = (format!("{LAYERS}.{layer}"), format!("model.layers.{layer}"));
        table.norm(&format!("{to}.input_layernorm"), &format!("{from}.input_layernorm"));
        let project = |name, count| (format!("{from}.self_attn.{name}"), count, heads.dim);
        let qkv =
            [project("q_proj", heads.query), project("k_proj", heads.key_value), project("v_proj", heads.key_value)];
        table.column(&format!("{to}.attention.qkv"), &qkv);
        table.row(&format!("{to}.attention.dense"), &format!("{from}.self_attn.o_proj"));
        table.norm(&format!("{to}.post_layernorm"), &format!("{from}.post_attention_layernorm"));
        table.column(&format!("{to}.mlp.fc"), &[(format!("{from}.mlp.gate_proj"), ffn, 1)]);
        table.column(&format!("{to}.mlp.gate"), &[(format!("{from}.mlp.up_proj"), ffn, 1)]);
        table.row(&format!("{to}.mlp.proj"), &format!("{from}.mlp.down_proj"));
    }
    table.norm("transformer.ln_f", "model.norm");
    table.tensor("lm_head.weight", "lm_head.weight", llama.vocab, Split::Words, Form::Same);
    table.fields
}

pub(super) fn opt(opt: &Opt, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    let decoder = "model.decoder";
    let positions = format!("{decoder}.embed_positions.weight");
    table.tensor(
        "transformer.vocab_embedding.weight",
        &format!("{decoder}.embed_tokens.weight"),
        opt.vocab,
        embedding,
        Form::Same,
    );
    table.tensor("transformer.position_embedding.weight", &positions, 0, Split::Whole, Form::Tail(OFFSET));
    for layer in 0..opt.layers {
        let (to, from) = (format!("{LAYERS}.{layer}"), format!("{decoder}.layers.{layer}"));
        table.norm(&format!("{to}.input_layernorm"), &format!("{from}.self_attn_layer_norm"));
        let qkv = ["q_proj", "k_proj", "v_proj"]
            .map(|name| (format!("{from}.self_attn.{name}"), opt.heads.query, opt.heads.dim));
        table.column(&format!("{to}.attention.qkv"), &qkv);
        table.row(&format!("{to}.attention.dense"), &format!("{from}.self_attn.out_proj"));
        table.norm(&format!("{to}.post_layernorm"), &format!("{from}.final_layer_norm"));
        table.column(&format!("{to}.mlp.fc"), &[(format!("{from}.fc1"), opt.ffn, 1)]);
        table.row(&format!("{to}.mlp.proj"), &format!("{from}.fc2"));
    }
    table.norm("transformer.ln_f", &format!("{decoder}.final_layer_norm"));
    table.tensor("lm_head.weight", "lm_head.weight", opt.vocab, Split::Words, Form::Same);
    table.fields
}
