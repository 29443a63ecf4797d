//! Folders that must be refused, each with its message and a hint, and models that cannot be converted.
use crate::common::*;
use crate::files::{Raw, Raws, peer};
use crate::folders::{base, convert, ranks};
use graphs::DType;
use serde_json::{Value, json};
use std::path::Path;

type Tensors = fn(usize, &mut Raws);
type Folder = fn(&Path);

const TWO: &str = "trtllm-tp2-w4a16-awq";
const ONE: &str = "trtllm-tp1-w8a8-sq";
const QKV: &str = "transformer.layers.0.attention.qkv";

fn same(_: usize, _: &mut Raws) {}

fn nothing(_: &Path) {}

fn set(folder: &Path, edit: impl FnOnce(&mut Value)) {
    edit_json(&folder.join("config.json"), edit);
}

fn own<'t>(tensors: &'t mut Raws, name: &str) -> &'t mut Raw {
    tensors.get_mut(&format!("{QKV}.{name}")).unwrap()
}

/// The folder, what is done to its tensors, then to it, what is said.
const CASES: [(&str, Tensors, Folder, &str); 27] = [
    (
        TWO,
        same,
        |f| std::fs::remove_file(f.join("rank1.safetensors")).unwrap(),
        "`DIR`: the files of 2 ranks are wanted, `rank1.safetensors` is missing",
    ),
    (
        TWO,
        same,
        |f| std::fs::copy(f.join("rank1.safetensors"), f.join("rank2.safetensors")).map(|_| ()).unwrap(),
        "`DIR`: the files of 2 ranks are wanted, `rank2.safetensors` is there too",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["mapping"] = json!({ "world_size": 1, "tp_size": 1, "pp_size": 1 })),
        "`DIR`: the files of 1 ranks are wanted, `rank1.safetensors` is there too",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["mapping"]["world_size"] = json!(4)),
        "`DIR/config.json`: `mapping.world_size` is `4`, wanted `2`, tp_size x pp_size",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["mapping"] = json!({ "world_size": 2, "tp_size": 1, "pp_size": 2 })),
        "`DIR/config.json`: `mapping.pp_size` is `2`, wanted 1",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["mapping"]["tp_size"] = json!("two")),
        "`DIR/config.json`: `mapping.tp_size` is `two`, wanted a whole number above 0",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["mapping"]["tp_size"] = json!(1_000_000)),
        "`DIR/config.json`: `mapping.tp_size` is `1000000`, wanted at most 1024",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["quantization"]["quant_algo"] = json!("FP8")),
        "`DIR` is quantized in a way that cannot be kept: `quantization.quant_algo` is `FP8`, wanted `W4A16_AWQ`",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["quantization"]["quant_algo"] = json!("W8A8_SQ_PER_TENSOR_PLUGIN")),
        "`quantization.quant_algo` is `W8A8_SQ_PER_TENSOR_PLUGIN`",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["quantization"]["kv_cache_quant_algo"] = json!("INT8")),
        "`quantization.kv_cache_quant_algo` asks for a quantized key/value cache (`INT8`)",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["quantization"]["group_size"] = json!(64)),
        ".weight_scale` has groups of 128 inputs, the config says 64",
    ),
    (
        TWO,
        |rank, t| {
            if rank == 1 {
                drop(t.remove(&format!("{QKV}.weight")).unwrap());
            }
        },
        nothing,
        "`DIR`: `rank1.safetensors` has no tensor `transformer.layers.0.attention.qkv.weight`, which rank 0 has",
    ),
    (
        TWO,
        |rank, t| {
            if rank == 1 {
                own(t, "weight").shape = vec![256, 128];
            }
        },
        nothing,
        "tensor `transformer.layers.0.attention.qkv.weight` in `rank1.safetensors` has shape [256, 128], wanted [128, 256] as in rank 0",
    ),
    (
        TWO,
        |rank, t| {
            if rank == 1 {
                own(t, "weights_scaling_factor").dtype = "I32".into();
            }
        },
        nothing,
        "in `rank1.safetensors` is int32, wanted float32 as in rank 0",
    ),
    (
        TWO,
        |rank, t| {
            if rank == 1 {
                own(t, "prequant_scaling_factor").bytes[0] ^= 1;
            }
        },
        nothing,
        "tensor `transformer.layers.0.attention.qkv.prequant_scaling_factor` in `rank1.safetensors` differs from that of rank 0",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["num_key_value_heads"] = json!(4)),
        "in `rank0.safetensors` has shape [128, 256], wanted 192 rows, as config.json has its heads and sizes",
    ),
    (
        TWO,
        same,
        |f| {
            set(f, |c| {
                c["num_attention_heads"] = json!(3);
                c["num_key_value_heads"] = json!(3);
            })
        },
        "is made of `model.layers.0.self_attn.q_proj.weight`, whose 3 heads or rows 2 ranks do not share alike",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["vocab_size"] = json!(500)),
        "tensor `transformer.vocab_embedding.weight` in `rank0.safetensors` has shape [224, 256], wanted 250 rows of the 500 in 2 ranks",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["num_hidden_layers"] = json!(1)),
        "`DIR`: `rank0.safetensors` has tensors that no layer of the model has: `transformer.layers.1.attention.dense.",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["num_hidden_layers"] = json!(3)),
        "tensor `model.layers.2.input_layernorm.weight` is missing",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["architecture"] = json!("GPTForCausalLM")),
        "`DIR/config.json`: `architecture` is `GPTForCausalLM`, wanted `LlamaForCausalLM` or `OPTForCausalLM`",
    ),
    (TWO, same, |f| set(f, |c| c["hidden_size"] = Value::Null), "`DIR/config.json`: `hidden_size` is missing"),
    (TWO, same, |f| set(f, |c| c["hidden_act"] = json!("softsign")), "`DIR/config.json`: the model is not supported: "),
    (
        TWO,
        same,
        |f| set(f, |c| c["rotary_pct"] = json!(0.5)),
        "`DIR/config.json`: `rotary_pct` is `0.5`, wanted `1.0` or `1`",
    ),
    (
        TWO,
        same,
        |f| set(f, |c| c["embedding_sharding_dim"] = json!(2)),
        "`DIR/config.json`: `embedding_sharding_dim` is `2`, wanted 0 or 1",
    ),
    (
        ONE,
        |_, t| {
            let scale = t.remove(&format!("{QKV}.weights_scaling_factor")).unwrap();
            drop(t.insert(format!("{QKV}.per_channel_scale"), scale));
        },
        nothing,
        "`transformer.layers.0.attention.qkv.per_channel_scale` in `rank0.safetensors` belongs to weights in the order of TensorRT-LLM's kernels",
    ),
    (
        ONE,
        |_, t| drop(t.remove(&format!("{QKV}.activation_scaling_factor")).unwrap()),
        nothing,
        "tensor `model.layers.0.self_attn.k_proj.input_scale` is missing, which `model.layers.0.self_attn.k_proj.weight` needs",
    ),
];

#[test]
fn faults_are_told() {
    for (name, tensors, change, wanted) in CASES {
        let root = tempfile::tempdir().unwrap();
        let (folder, output) = (root.path().join("model"), root.path().join("engines"));
        ranks(name, &folder, tensors);
        change(&folder);
        let path = folder.to_str().unwrap();
        let (code, text) = refuse(&["build", path, "-o", output.to_str().unwrap(), "--target", "reference", "-q"]);
        let wanted = wanted.replace("DIR", path);
        assert!(code == 1 && text.contains(&wanted), "wanted {wanted}\nfound {text}");
        assert!(text.contains("hint") && text.contains(path), "{text}");
        assert!(!output.exists());
    }
}

/// An encoder and a decoder that do not belong together.
#[test]
fn sides_must_fit() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    language_alone("blip2-t5", &model);
    let cases: [(Folder, &str); 8] = [
        (|f| std::fs::remove_dir_all(f.join("encoder")).unwrap(), "`DIR/encoder/config.json` is missing"),
        (|f| std::fs::remove_dir_all(f.join("decoder")).unwrap(), "`DIR/config.json` is missing"),
        (
            |f| std::fs::remove_file(f.join("encoder/rank1.safetensors")).unwrap(),
            "`DIR/encoder`: the files of 2 ranks are wanted, `rank1.safetensors` is missing",
        ),
        (
            |f| set(&f.join("encoder"), |c| c["vocab_size"] = json!(9)),
            "`DIR/decoder/config.json`: `vocab_size` is `9` in encoder/config.json and `240` in decoder/config.json, wanted the same",
        ),
        (
            |f| set(&f.join("encoder"), |c| c["architecture"] = json!("DecoderModel")),
            "`architecture` is `DecoderModel`, wanted `EncoderModel`",
        ),
        (
            |f| set(&f.join("decoder"), |c| c["layernorm_position"] = json!(1)),
            "`layernorm_position` is `1`, wanted `0`",
        ),
        (|f| set(&f.join("decoder"), |c| c["layernorm_type"] = json!(0)), "`layernorm_type` is `0`, wanted `1`"),
        (
            |f| {
                std::fs::copy(f.join("encoder/rank1.safetensors"), f.join("decoder/rank1.safetensors"))
                    .map(drop)
                    .unwrap()
            },
            "`decoder/rank1.safetensors` has no tensor",
        ),
    ];
    for (place, (change, wanted)) in cases.into_iter().enumerate() {
        let folder = root.path().join(format!("converted {place}"));
        convert(&model, &folder, 2);
        change(&folder);
        let path = folder.to_str().unwrap();
        let (code, text) = refuse(&["plan", path]);
        let wanted = wanted.replace("DIR", path);
        assert!(code == 1 && text.contains(&wanted) && text.contains("hint"), "wanted {wanted}\nfound {text}");
    }
}

#[test]
fn what_cannot_be_converted_is_told() {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str| root.path().join(name);
    base(&place("base"));
    peer("gptq-g64-asymmetric", &place("gptq"), |_| ());
    ranks(TWO, &place("awq"), same);
    let narrow = opt_config(json!({ "word_embed_proj_dim": 32 }));
    write_checkpoint(&place("narrow"), &narrow, &random_tensors(&narrow), DType::Float16, 1);
    std::fs::create_dir(place("full")).unwrap();
    std::fs::write(place("full").join("letter.txt"), "dear").unwrap();
    let nougat = fixture("nougat");
    for (model, tp, output, wanted, hint) in [
        (
            place("base"),
            "3",
            "new",
            "--tp 3: `model.layers.0.self_attn.q_proj.weight`: its 4 heads are not shared alike by 3 ranks",
            "--tp may be 1, 2, 4",
        ),
        (place("base"), "0", "new", "--tp 0: there is at least one rank", "--tp 1"),
        (place("base"), "1", "full", "exists and is not empty", "choose another folder"),
        (place("awq"), "4", "new", "columns do not divide by 4 ranks", "--tp may be 1, 2"),
        (
            place("gptq"),
            "1",
            "new",
            "layers quantized by `gptq` have another layout than TensorRT-LLM's",
            "build the checkpoint itself",
        ),
        (place("narrow"), "1", "new", "embeddings of 32 features in a model of 64", "build the checkpoint itself"),
        (nougat, "1", "new", "has no place for `vision-encoder-decoder`", "it has places for LLaMA"),
    ] {
        let (model, output) = (model.to_str().unwrap(), place(output));
        let (code, text) = refuse(&["convert", model, "-o", output.to_str().unwrap(), "--tp", tp]);
        assert!(code == 1 && text.contains(wanted) && text.contains(hint), "wanted {wanted}\nfound {text}");
    }
    assert!(!place("new").exists());
    assert_eq!(std::fs::read_dir(place("full")).unwrap().count(), 1);
}
