//! Command lines and inputs that are refused, each with its message and exit code.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn wrong_usage_exits_with_2() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage: trtvlm"),
        (&["bild", "x"], "unrecognized subcommand 'bild'"),
        (&["build"], "<MODEL>"),
        (&["build", "x"], "--output"),
        (&["build", "x", "-o", "y", "--target", "cpu"], "invalid value 'cpu'"),
        (&["build", "x", "-o", "y", "--gpu", "sm90"], "wanted one of sm75, sm80, sm86, sm89, sm120, sm121"),
        (&["build", "x", "-o", "y", "--gpu", "h100"], "wanted one of sm75"),
        (&["build", "x", "-o", "y", "--dtype", "float8"], "wanted auto, float16, bfloat16 or float32"),
        (&["build", "x", "-o", "y", "--max-batch-size", "many"], "invalid value 'many'"),
        (&["build", "x", "-o", "y", "--max-batch-size", "-1"], "unexpected argument '-1'"),
        (&["run", "x"], "--prompt"),
        (&["backend", "install", "cuda"], "invalid value 'cuda'"),
        (&["eval"], "Usage: trtvlm eval"),
        (&["plan", "x", "--progress", "loud"], "invalid value 'loud'"),
    ];
    for (arguments, wanted) in cases {
        let (code, text) = refuse(arguments);
        assert!(code == 2 && text.contains(wanted), "{arguments:?}: {code} {text}");
    }
}

#[test]
fn help_and_version_are_answers() {
    let help = String::from_utf8(succeed(&["--help"]).stdout).unwrap();
    for command in ["build", "plan", "run", "inspect", "backend", "demo", "eval"] {
        assert!(help.contains(&format!("  {command}")), "{command}");
        let text = String::from_utf8(succeed(&[command, "--help"]).stdout).unwrap();
        assert!(text.contains("Examples:"), "{command}");
    }
    assert!(!help.contains("build-engine"));
    let version = String::from_utf8(succeed(&["--version"]).stdout).unwrap();
    assert_eq!(version, format!("trtvlm {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_reader_that_has_gone_does_no_harm() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_trtvlm"))
        .args(["inspect", fixture("llava-hf").to_str().unwrap(), "--tensors", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

/// The LLaVA fixture with its config changed.
fn changed(root: &Path, name: &str, change: impl FnOnce(&mut Value)) -> String {
    let folder = root.join(name);
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(fixture("llava-hf")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.display().to_string()
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    type Change = fn(&mut Value);
    let cases: &[(&str, Change, &str)] = &[
        (
            "architecture",
            |c| c["architectures"] = json!(["FuyuForCausalLM"]),
            "`architectures`: `FuyuForCausalLM` is not supported",
        ),
        (
            "no-architecture",
            |c| {
                c["architectures"] = json!(null);
                c["model_type"] = json!(null)
            },
            "`architectures`: missing, and no `model_type` either",
        ),
        (
            "heads",
            |c| c["text_config"]["num_attention_heads"] = json!(5),
            "`text_config.num_key_value_heads`: 5 attention heads do not divide by 4",
        ),
        (
            "zero",
            |c| c["text_config"]["hidden_size"] = json!(0),
            "`text_config.hidden_size`: wanted a whole number from 1",
        ),
        ("text", |c| c["text_config"]["vocab_size"] = json!("448"), "`text_config.vocab_size`: wanted a whole number"),
        (
            "huge",
            |c| c["text_config"]["vocab_size"] = json!(1u64 << 40),
            "`text_config.vocab_size`: wanted a whole number",
        ),
        (
            "act",
            |c| c["text_config"]["hidden_act"] = json!("mish"),
            "`text_config.hidden_act`: activation `mish` is not supported",
        ),
        (
            "rope",
            |c| c["text_config"]["rope_parameters"]["rope_type"] = json!("yarn"),
            "rope scaling `yarn` is not supported",
        ),
        (
            "eps",
            |c| c["text_config"]["rms_norm_eps"] = json!(-1),
            "`text_config.rms_norm_eps`: wanted a number above 0",
        ),
        (
            "odd-head",
            |c| c["text_config"]["head_dim"] = json!(13),
            "`text_config.head_dim`: rotary embedding needs an even size, found 13",
        ),
        ("tied", |c| c["tie_word_embeddings"] = json!("yes"), "`tie_word_embeddings`: wanted true or false"),
        (
            "layer",
            |c| c["vision_feature_layer"] = json!(-9),
            "`vision_feature_layer`: entry -9 is outside the 4 hidden states",
        ),
        (
            "strategy",
            |c| c["vision_feature_select_strategy"] = json!("best"),
            "wanted `default` or `full`, found `best`",
        ),
        ("patch", |c| c["vision_config"]["patch_size"] = json!(99), "a patch of 99 does not fit a picture of 28"),
        ("vision", |c| c["vision_config"] = json!([1]), "`vision_config`: wanted an object"),
        (
            "vision-kind",
            |c| c["vision_config"]["model_type"] = json!("dinov2"),
            "wanted `clip_vision_model`, found `dinov2`",
        ),
        ("language", |c| c["text_config"]["model_type"] = json!("qwen2"), "wanted `llama`, found `qwen2`"),
        (
            "width",
            |c| c["text_config"]["intermediate_size"] = json!(97),
            "mlp.down_proj.weight`: wanted shape [48, 97], found [48, 96]",
        ),
        ("deeper", |c| c["text_config"]["num_hidden_layers"] = json!(3), "layers.2.input_layernorm.weight` is missing"),
        (
            "shallower",
            |c| c["text_config"]["num_hidden_layers"] = json!(1),
            "layers.1.input_layernorm.weight` is used by no layer",
        ),
    ];
    for (name, change, wanted) in cases {
        let checkpoint = changed(root.path(), name, change);
        let (code, text) = refuse(&["plan", &checkpoint]);
        assert!(code == 1 && text.contains(wanted) && text.contains("hint:"), "{name}: {code} {text}");
    }
}

#[test]
fn requests_that_do_not_fit_are_refused_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let foreign = root.path().join("letters");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("letter.txt"), "dear").unwrap();
    let recipe = root.path().join("recipe.toml");
    std::fs::write(&recipe, "name = 'r'\n[[rule]]\nmatch = '**.nothing'\nformat = 'int8'\n").unwrap();
    let output = root.path().join("engines").display().to_string();
    let (foreign, recipe) = (foreign.display().to_string(), recipe.display().to_string());
    let llava = fixture("llava-hf").display().to_string();
    let config = llama_config(json!({}));
    let language = root.path().join("language");
    write_checkpoint(&language, &config, &random_tensors(&config), DType::Float32, 1);
    let language = language.display().to_string();
    let cases: &[(&str, &str, &[&str], &str)] = &[
        ("nowhere", &output, &[], "nowhere"),
        (&llava, &foreign, &[], "exists and is not an engine directory"),
        (&llava, &output, &["--quant", "int9"], "there is no quantization preset `int9`"),
        (&llava, &output, &["--quant", "nowhere.toml"], "nowhere.toml"),
        (&llava, &output, &["--quant", &recipe], "rule 0 (`**.nothing`) matches no linear layer"),
        (&llava, &output, &["--quant", "int4-g128"], "inputs, wanted a multiple of [128]"),
        (&llava, &output, &["--max-batch-size", "0"], "sizes must be at least 1"),
        (&llava, &output, &["--max-input-len", "16"], "`max_input_len` 16 leaves no token beside the 16 of a picture"),
        (&llava, &output, &["--max-input-len", "200"], "exceed the model's 128 positions"),
        (
            &llava,
            &output,
            &["--max-batch-size", "2", "--max-multimodal-len", "16"],
            "`max_multimodal_len` 16 is below 32",
        ),
        (&llava, &output, &["--tp", "2"], "--tp 2"),
        (&llava, &output, &["--target", "tensorrt"], "target `tensorrt` is not built yet"),
        (&language, &output, &["--vision-quant", "int8"], "the model has no vision network"),
    ];
    for (model, output, flags, wanted) in cases {
        let target = if flags.contains(&"--target") { &[][..] } else { &["--target", "reference"] };
        let arguments = [&["build", model, "-o", output], *flags, target].concat();
        let (code, text) = refuse(&arguments);
        assert!(code == 1 && text.contains(wanted), "{arguments:?}: {code} {text}");
        assert!(!Path::new(&root.path().join("engines")).exists());
    }
    assert_eq!(std::fs::read_to_string(Path::new(&foreign).join("letter.txt")).unwrap(), "dear");
}

#[test]
fn failures_are_json_too() {
    let output = trtvlm(&["plan", "nowhere", "--json"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&value["schema"], &value["error"]["exit"]), (&json!(1), &json!(1)));
    assert!(value["error"]["message"].as_str().unwrap().contains("nowhere"));
}
