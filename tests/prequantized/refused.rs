//! Quantized checkpoints that must be refused, each with its message and a hint.
use crate::common::{edit_json, refuse};
use crate::files::{Raw, Raws, peer};
use serde_json::{Value, json};

type Tensors = fn(&mut Raws);
type Config = fn(&mut Value);

const Q: &str = "model.layers.0.self_attn.q_proj";

fn own<'t>(tensors: &'t mut Raws, part: &str) -> &'t mut Raw {
    tensors.get_mut(&format!("{Q}.{part}")).unwrap()
}

fn take(tensors: &mut Raws, part: &str) -> Raw {
    tensors.remove(&format!("{Q}.{part}")).unwrap()
}

fn nothing(_: &mut Raws) {}

fn same(_: &mut Value) {}

fn quantization(config: &mut Value) -> &mut Value {
    &mut config["quantization_config"]
}

fn group(config: &mut Value) -> &mut Value {
    &mut quantization(config)["config_groups"]["group_0"]
}

const AWQ: &str = "autoawq-gemm-g128-asymmetric";
const GPTQ: &str = "gptq-g64-asymmetric";
const PACKED: &str = "compressed-tensors-w4a16-g128";
const BYTES: &str = "compressed-tensors-w8a8-dynamic";
const UNIFIED: &str = "unified-w8a8-sq";

/// The folder, what is done to its tensors and to its config, what is said.
const CASES: [(&str, Tensors, Config, &str); 30] = [
    (AWQ, |t| drop(take(t, "scales")), same, "tensor `{Q}.scales` is missing, which `{Q}.qweight` needs"),
    (AWQ, |t| drop(take(t, "qzeros")), same, "tensor `{Q}.qzeros` is missing, which `{Q}.qweight` needs"),
    (AWQ, |t| own(t, "qzeros").shape = vec![32, 2], same, "tensor `{Q}.qzeros` is int32[32, 2], wanted int32[2, 32]"),
    (
        AWQ,
        |t| own(t, "scales").shape = vec![256, 2],
        same,
        "tensor `{Q}.scales` is float16[256, 2], wanted [groups, 256]",
    ),
    (
        AWQ,
        |t| own(t, "qweight").dtype = "F32".into(),
        same,
        "tensor `{Q}.qweight` is float32[256, 32], wanted int32[in, out / 8]",
    ),
    (
        AWQ,
        |t| own(t, "qweight").shape = vec![512, 16],
        same,
        "tensor `{Q}.scales` is float16[2, 256], wanted [groups, 128]",
    ),
    (AWQ, nothing, |c| quantization(c)["bits"] = json!(3), "`quantization_config.bits` is `3`, wanted 4"),
    (
        AWQ,
        nothing,
        |c| quantization(c)["version"] = json!("gemv"),
        "`quantization_config.version` is `gemv`, wanted `gemm`",
    ),
    (
        AWQ,
        nothing,
        |c| quantization(c)["group_size"] = json!(64),
        "tensor `model.layers.0.mlp.down_proj.scales` has groups of 128 inputs, the config says 64",
    ),
    (
        AWQ,
        nothing,
        |c| quantization(c)["group_size"] = json!(0),
        "`quantization_config.group_size` is `0`, wanted a number of inputs, or -1",
    ),
    (AWQ, nothing, |c| quantization(c)["zero_point"] = json!(false), "wanted 8: the config says that it is symmetric"),
    (
        AWQ,
        |t| own(t, "scales").bytes[..2].copy_from_slice(&[0, 0x7c]),
        same,
        "tensor `{Q}.scales` holds the scale `inf` at group 0 of output 0, wanted a positive number",
    ),
    (
        GPTQ,
        |t| own(t, "g_idx").bytes[4..8].copy_from_slice(&[3, 0, 0, 0]),
        same,
        "tensor `{Q}.g_idx` puts input 1 into group 3, wanted 0: groups must be consecutive inputs",
    ),
    (GPTQ, |t| own(t, "g_idx").shape = vec![2, 128], same, "tensor `{Q}.g_idx` is int32[2, 128], wanted int32[256]"),
    (
        GPTQ,
        |t| own(t, "qzeros").bytes[0] = 0xf5,
        same,
        "tensor `{Q}.qzeros` holds the zero point `16` at group 0 of output 1, wanted 0 to 15",
    ),
    (GPTQ, nothing, |c| quantization(c)["bits"] = json!(2), "`quantization_config.bits` is `2`, wanted 4 or 8"),
    (
        GPTQ,
        nothing,
        |c| quantization(c)["bits"] = json!(8),
        "tensor `model.layers.0.mlp.down_proj.g_idx` is int32[256], wanted int32[128]",
    ),
    (
        GPTQ,
        nothing,
        |c| quantization(c)["checkpoint_format"] = json!("marlin"),
        "`quantization_config.checkpoint_format` is `marlin`, wanted `gptq` or `gptq_v2`",
    ),
    (
        GPTQ,
        nothing,
        |c| quantization(c)["quant_method"] = json!("bitsandbytes"),
        "`quantization_config.quant_method` is `bitsandbytes`, wanted `awq`, `gptq`, `compressed-tensors` or `modelopt`",
    ),
    (
        PACKED,
        |t| drop(take(t, "weight_scale")),
        same,
        "tensor `{Q}.weight_scale` is missing, which `{Q}.weight_packed` needs",
    ),
    (
        PACKED,
        |t| own(t, "weight_shape").bytes[0] = 1,
        same,
        "tensor `{Q}.weight_shape` holds [257, 256], wanted [256, 256] as `{Q}.weight_packed` has it",
    ),
    (
        PACKED,
        nothing,
        |c| group(c)["weights"]["type"] = json!("float"),
        "`quantization_config.config_groups.group_0.weights.type` is `float`, wanted `int`",
    ),
    (
        PACKED,
        nothing,
        |c| quantization(c)["kv_cache_scheme"] = json!({ "num_bits": 8 }),
        "`quantization_config.kv_cache_scheme` asks for a quantized key/value cache",
    ),
    (
        PACKED,
        nothing,
        |c| group(c)["format"] = json!("nvfp4-pack-quantized"),
        "group_0.format` is `nvfp4-pack-quantized`, wanted `pack-quantized` or `int-quantized`",
    ),
    (BYTES, |t| drop(take(t, "weight_scale")), same, "tensor `{Q}.weight_scale` is missing, which `{Q}.weight` needs"),
    (
        BYTES,
        nothing,
        |c| group(c)["input_activations"]["symmetric"] = json!(false),
        "input_activations.symmetric` is `false`, wanted true: inputs with zero points are not supported",
    ),
    (
        BYTES,
        nothing,
        |c| group(c)["weights"]["num_bits"] = json!(4),
        "is quantized in 8 bits, which no part of the config describes",
    ),
    (UNIFIED, |t| drop(take(t, "input_scale")), same, "tensor `{Q}.input_scale` is missing, which `{Q}.weight` needs"),
    (
        UNIFIED,
        |t| own(t, "pre_quant_scale").shape = vec![2, 128],
        same,
        "tensor `{Q}.pre_quant_scale` is float32[2, 128], wanted floats [256]",
    ),
    (
        UNIFIED,
        |t| own(t, "weight").shape = vec![128, 512],
        same,
        "tensor `{Q}.weight_scale` is float32[256], wanted [128, groups]",
    ),
];

#[test]
fn faults_are_told() {
    for (name, tensors, config, wanted) in CASES {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        peer(name, &folder, tensors);
        edit_json(&folder.join("config.json"), config);
        let output = root.path().join("engines");
        let (code, text) =
            refuse(&["build", folder.to_str().unwrap(), "-o", output.to_str().unwrap(), "--target", "reference", "-q"]);
        let wanted = wanted.replace("{Q}", Q);
        assert!(code == 1 && text.contains(&wanted), "wanted {wanted}\nfound {text}");
        assert!(text.contains("hint") && text.contains(folder.to_str().unwrap()), "{text}");
        assert!(!output.exists());
    }
}

/// What modelopt names in a file of its own.
#[test]
fn algorithms_are_refused_by_name() {
    for (key, value, wanted) in [
        (
            "quant_algo",
            "FP8",
            "`quantization.quant_algo` is `FP8`, wanted `W4A16_AWQ`, `W8A8_SQ_PER_CHANNEL` or `W8A16`",
        ),
        ("quant_algo", "NVFP4", "`quantization.quant_algo` is `NVFP4`"),
        ("quant_algo", "W4A8_AWQ", "`quantization.quant_algo` is `W4A8_AWQ`"),
        (
            "kv_cache_quant_algo",
            "FP8",
            "`quantization.kv_cache_quant_algo` asks for a quantized key/value cache (`FP8`)",
        ),
    ] {
        let root = tempfile::tempdir().unwrap();
        peer(UNIFIED, root.path(), nothing);
        edit_json(&root.path().join("hf_quant_config.json"), |config| config["quantization"][key] = json!(value));
        let (code, text) = refuse(&["plan", root.path().to_str().unwrap()]);
        assert!(code == 1 && text.contains(wanted) && text.contains("hint"), "{text}");
    }
}

/// Matrices of other sizes than config.json says are told as those of plain checkpoints are.
#[test]
fn sizes_are_those_of_the_model() {
    let root = tempfile::tempdir().unwrap();
    peer(AWQ, root.path(), nothing);
    edit_json(&root.path().join("config.json"), |config| config["intermediate_size"] = json!(384));
    let (code, text) = refuse(&["plan", root.path().to_str().unwrap()]);
    let wanted = "tensor `model.layers.0.mlp.gate_proj.weight`: wanted shape [384, 256], found [256, 256]";
    assert!(code == 1 && text.contains(wanted), "{text}");
}
