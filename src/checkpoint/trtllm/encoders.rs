//! Tables of the encoder-decoder families, in folders of their own for the encoder and the decoder.
use super::decoders::OFFSET;
use super::layout::{Field, Form, Split, Table};
use graphs::families::mbart::{Mbart, Stack};
use graphs::families::t5::T5;

const EMBEDDING: &str = "embedding.vocab_embedding.weight";

pub(super) fn t5_encoder(t5: &T5, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    table.tensor(EMBEDDING, "shared.weight", t5.vocab, embedding, Form::Same);
    for layer in 0..t5.encoder_layers {
        let (to, from) = (format!("encoder_layers.{layer}"), format!("encoder.block.{layer}"));
        t5_attention(&mut table, t5, [&to, &from], "attention", "layer.0", "SelfAttention");
        distances(&mut table, t5, &format!("{to}.attention"), "encoder", layer > 0);
        t5_feed_forward(&mut table, t5, [&to, &from], "layer.1");
    }
    table.norm("final_layernorm", "encoder.final_layer_norm");
    table.fields
}

pub(super) fn t5_decoder(t5: &T5, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    table.tensor(EMBEDDING, "shared.weight", t5.vocab, embedding, Form::Same).copy = true;
    for layer in 0..t5.layers {
        let (to, from) = (format!("decoder_layers.{layer}"), format!("decoder.block.{layer}"));
        t5_attention(&mut table, t5, [&to, &from], "self_attention", "layer.0", "SelfAttention");
        distances(&mut table, t5, &format!("{to}.self_attention"), "decoder", layer > 0);
        t5_attention(&mut table, t5, [&to, &from], "cross_attention", "layer.1", "EncDecAttention");
        t5_feed_forward(&mut table, t5, [&to, &from], "layer.2");
    }
    table.norm("final_layernorm", "decoder.final_layer_norm");
    table.tensor("lm_head.weight", "lm_head.weight", t5.vocab, Split::Words, Form::Same);
    table.fields
}

/// An attention, and the norm before it.
fn t5_attention(table: &mut Table, t5: &T5, [to, from]: [&str; 2], name: &str, layer: &str, module: &str) {
    let (to, from) = (format!("{to}.{name}"), format!("{from}.{layer}"));
    table.norm(&format!("{to}_layernorm"), &format!("{from}.layer_norm"));
    let project = |name| (format!("{from}.{module}.{name}"), t5.heads.query, t5.heads.dim);
    table.column(&format!("{to}.qkv"), &["q", "k", "v"].map(project));
    table.row(&format!("{to}.dense"), &format!("{from}.{module}.o"));
}

/// The table of distances, which Hugging Face has in the first block and TensorRT-LLM in every layer.
fn distances(table: &mut Table, t5: &T5, to: &str, stack: &str, copy: bool) {
    let from = format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
    let name = format!("{to}.rel_attn_table");
    table.tensor(&name, &from, t5.heads.query, Split::Rows, Form::Turned).copy = copy;
}

fn t5_feed_forward(table: &mut Table, t5: &T5, [to, from]: [&str; 2], layer: &str) {
    let from = format!("{from}.{layer}");
    table.norm(&format!("{to}.mlp_layernorm"), &format!("{from}.layer_norm"));
    let wide = |name: &str| [(format!("{from}.DenseReluDense.{name}"), t5.ffn, 1)];
    table.column(&format!("{to}.mlp.fc"), &wide(if t5.gated { "wi_0" } else { "wi" }));
    if t5.gated {
        table.column(&format!("{to}.mlp.gate"), &wide("wi_1"));
    }
    table.row(&format!("{to}.mlp.proj"), &format!("{from}.DenseReluDense.wo"));
}

pub(super) fn mbart_encoder(mbart: &Mbart, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    let Some(stack) = &mbart.encoder else { return table.fields };
    table.tensor(EMBEDDING, "model.shared.weight", mbart.vocab, embedding, Form::Same);
    mbart_stack(&mut table, stack, "encoder", &[("attention", "self_attn")]);
    table.fields
}

/// TensorRT-LLM has no place for `final_logits_bias`, which is zero in trained models. Where it is not, it is `lm_head.bias`
/// here, which TensorRT-LLM itself would refuse.
pub(super) fn mbart_decoder(mbart: &Mbart, embedding: Split) -> Vec<Field> {
    let mut table = Table::default();
    table.tensor(EMBEDDING, "model.shared.weight", mbart.vocab, embedding, Form::Same).copy = true;
    mbart_stack(
        &mut table,
        &mbart.stack,
        "decoder",
        &[("self_attention", "self_attn"), ("cross_attention", "encoder_attn")],
    );
    table.tensor("lm_head.weight", "lm_head.weight", mbart.vocab, Split::Words, Form::Same);
    table.tensor("lm_head.bias", "final_logits_bias", mbart.vocab, Split::Words, Form::Flat);
    table.fields
}

fn mbart_stack(table: &mut Table, stack: &Stack, side: &str, attentions: &[(&str, &str)]) {
    let from = format!("model.{side}");
    let positions = format!("{from}.embed_positions.weight");
    table.tensor("embedding.position_embedding.weight", &positions, 0, Split::Whole, Form::Tail(OFFSET));
    table.norm("embedding.embedding_layernorm", &format!("{from}.layernorm_embedding"));
    for layer in 0..stack.layers {
        let (to, from) = (format!("{side}_layers.{layer}"), format!("{from}.layers.{layer}"));
        for (name, module) in attentions {
            table.norm(&format!("{to}.{name}_layernorm"), &format!("{from}.{module}_layer_norm"));
            let project = |name| (format!("{from}.{module}.{name}"), stack.heads.query, stack.heads.dim);
            table.column(&format!("{to}.{name}.qkv"), &["q_proj", "k_proj", "v_proj"].map(project));
            table.row(&format!("{to}.{name}.dense"), &format!("{from}.{module}.out_proj"));
        }
        table.norm(&format!("{to}.mlp_layernorm"), &format!("{from}.final_layer_norm"));
        table.column(&format!("{to}.mlp.fc"), &[(format!("{from}.fc1"), stack.ffn, 1)]);
        table.row(&format!("{to}.mlp.proj"), &format!("{from}.fc2"));
    }
    table.norm("final_layernorm", &format!("{from}.layer_norm"));
}
