//! Command lines and inputs that are refused, each with its message and exit code.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

const COMMANDS: [&str; 11] =
    ["build", "plan", "calibrate", "run", "verify", "bench", "inspect", "synth", "backend", "demo", "eval"];

/// The program with the user's own settings taken away.
fn shell(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trtvlm"));
    for name in ["TRTVLM_DEMO_MODEL", "TRTVLM_PROGRESS", "NO_COLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn stdout(arguments: &[&str]) -> String {
    let output = shell(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{arguments:?} spoke on standard error");
    String::from_utf8(output.stdout).unwrap()
}

/// Each wrong command line, and the part of its message that names the fault.
const WRONG: &[(&[&str], &str)] = &[
    (&[], "Usage: trtvlm"),
    (&["build", "model", "-o", "out", "--max-batch-size", "many"], "invalid value 'many'"),
    (&["eval"], "Usage: trtvlm eval"),
    (&["compile"], "unrecognized subcommand 'compile'"),
    (&["buidl", "model"], "unrecognized subcommand 'buidl'\n\n  tip: some similar"),
    (&["build"], "--output <OUTPUT>"),
    (&["build", "model"], "--output <OUTPUT>"),
    (&["build", "-o", "out"], "<MODEL>"),
    (&["build", "model", "-o", "out", "--gpu", "sm90"], "wanted one of sm75, sm80, sm86, sm89, sm120, sm121"),
    (&["build", "model", "-o", "out", "--gpu", "89"], "invalid value '89' for '--gpu <GPU>'"),
    (&["build", "model", "-o", "out", "--gpu", "sm89,sm9"], "invalid value 'sm9' for '--gpu <GPU>'"),
    (&["build", "model", "-o", "out", "--gpu", "sm99999999999"], "invalid value 'sm99999999999'"),
    (&["build", "model", "-o", "out", "--dtype", "int8"], "wanted auto, float16, bfloat16 or float32"),
    (&["build", "model", "-o", "out", "--dtype", "FLOAT16"], "invalid value 'FLOAT16' for '--dtype <DTYPE>'"),
    (&["build", "model", "-o", "out", "--target", "cuda"], "[possible values: reference, rtx, tensorrt]"),
    (&["build", "model", "-o", "out", "--tp", "two"], "invalid value 'two' for '--tp <TP>'"),
    (&["build", "model", "-o", "out", "--max-batch-size", "-1"], "unexpected argument '-1'"),
    (&["build", "model", "-o", "out", "--max-input-len", "1e3"], "invalid value '1e3' for '--max-input-len"),
    (&["build", "model", "-o", "out", "--timeout", "1.5"], "invalid value '1.5' for '--timeout <TIMEOUT>'"),
    (&["build", "model", "-o", "out", "-o", "other"], "cannot be used multiple times"),
    (&["plan", "model", "--output", "out"], "unexpected argument '--output'"),
    (&["plan", "model", "other"], "unexpected argument 'other'"),
    (&["plan", "model", "--quantt", "int4"], "a similar argument exists: '--quant'"),
    (&["calibrate", "model", "-o", "stats"], "--data <FILE_OR_DIR>"),
    (&["run", "directory"], "--prompt <TEXT>"),
    (&["run", "--prompt", "text"], "<DIRECTORY>"),
    (&["run", "directory", "--image"], "a value is required for '--image <FILE>...'"),
    (&["run", "directory", "--prompt"], "a value is required for '--prompt <TEXT>...'"),
    (&["run", "directory", "--prompt", "text", "--max-new-tokens", "-1"], "unexpected argument '-1'"),
    (&["inspect"], "<PATH>"),
    (&["backend"], "Usage: trtvlm backend"),
    (&["backend", "install", "cudnn"], "[possible values: rtx, nvrtc]"),
    (&["build", "model", "-o", "out", "--optimization-level", "6"], "6 is not in 0..=5"),
    (&["synth", "llama-2-7b"], "--output <DIR>"),
    (&["verify", "engines", "--steps", "many"], "invalid digit"),
    (&["bench", "engines", "--batch", "1,x"], "invalid digit"),
    (&["backend", "remove", "rtx"], "unrecognized subcommand 'remove'"),
    (&["eval", "text", "model"], "--text <FILE>"),
    (&["eval", "pictures", "model", "--pictures", "p", "--references", "r"], "--task <FILE>"),
    (&["eval", "sounds", "model"], "unrecognized subcommand 'sounds'"),
    (&["plan", "model", "--color", "sometimes"], "[possible values: auto, always, never]"),
    (&["plan", "model", "--progress", "dots"], "[possible values: auto, bar, plain, none]"),
    (&["build-engine"], "<SPEC>"),
];

#[test]
fn wrong_command_lines_exit_2_and_name_the_fault() {
    for (arguments, part) in WRONG {
        let output = shell(arguments).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(part), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?} wrote a usage error on standard output");
    }
}

#[test]
fn a_wrong_environment_is_a_usage_error() {
    let output = shell(&["plan", "model"]).env("TRTVLM_PROGRESS", "dots").output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("invalid value 'dots' for '--progress <PROGRESS>'"), "{message}");
}

#[test]
fn help_lists_every_command_once_and_hides_the_inner_one() {
    let help = stdout(&["--help"]);
    for command in COMMANDS {
        let lines = help.lines().filter(|line| line.split_whitespace().next() == Some(command)).count();
        assert_eq!(lines, 1, "`{command}` in {help}");
    }
    assert!(!help.contains("build-engine"), "{help}");
}

#[test]
fn help_of_each_command_ends_in_two_examples_of_it() {
    for command in COMMANDS {
        let help = stdout(&[command, "--help"]);
        let (_, examples) = help.rsplit_once("Examples:\n").unwrap_or_else(|| panic!("no examples: {help}"));
        let start = format!("  trtvlm {command}");
        assert_eq!(examples.lines().filter(|line| line.starts_with(&start)).count(), 2, "{help}");
    }
}

#[test]
fn help_names_the_environment() {
    assert!(stdout(&["demo", "--help"]).contains("[env: TRTVLM_DEMO_MODEL="));
    assert!(stdout(&["plan", "--help"]).contains("[env: TRTVLM_PROGRESS="));
}

/// `-v` is for more words, so the version has the capital letter; both belong to every command.
#[test]
fn the_version_is_the_crates() {
    let version = env!("CARGO_PKG_VERSION");
    for flag in ["--version", "-V"] {
        assert_eq!(stdout(&[flag]), format!("trtvlm {version}\n"));
    }
    assert_eq!(stdout(&["build", "--version"]), format!("trtvlm-build {version}\n"));
}

/// Lists that take several values, repeated or in a row, and global flags on either side of the command: all are read,
/// and the refusal is about the missing directory (exit 1), not about the words (exit 2).
#[test]
fn lists_and_global_flags_are_read_in_every_place() {
    let lines: [&[&str]; 4] = [
        &["run", "no-such-directory", "--prompt", "a", "b"],
        &["run", "no-such-directory", "--prompt", "a", "--prompt", "b"],
        &["-qq", "--json", "run", "no-such-directory", "--prompt", "a"],
        &["run", "no-such-directory", "--prompt", "a", "-vv", "--color", "never", "--progress", "none"],
    ];
    for arguments in lines {
        let output = shell(arguments).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.starts_with("error: ") && message.contains("no-such-directory"), "{arguments:?}: {message}");
    }
}

#[test]
fn a_failure_is_one_json_object_on_standard_output() {
    let output = shell(&["inspect", "no-such-path", "--json"]).output().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["schema"], 1);
    assert_eq!(value["error"]["exit"].as_i64(), output.status.code().map(i64::from));
    assert!(value["error"]["message"].as_str().unwrap().contains("no-such-path"), "{value}");
    assert!(value["error"]["causes"].is_array() && value["error"].get("hint").is_some(), "{value}");
}

#[test]
fn colour_is_only_where_it_is_asked_for() {
    let escape = |arguments: &[&str]| shell(arguments).output().unwrap().stderr.contains(&0x1b);
    assert!(!escape(&["inspect", "no-such-path"]), "a pipe is no terminal");
    assert!(escape(&["inspect", "no-such-path", "--color", "always"]));
    let forced = shell(&["inspect", "no-such-path"]).env("CLICOLOR_FORCE", "1").output().unwrap();
    assert!(forced.stderr.contains(&0x1b));
    let both = shell(&["inspect", "no-such-path"]).envs([("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]).output();
    assert!(!both.unwrap().stderr.contains(&0x1b), "NO_COLOR wins");
}

/// As in `trtvlm ... | head -0`: the reading end is closed before the program starts, so that its first write fails.
#[test]
fn a_closed_pipe_ends_quietly() {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/llava-hf");
    let lines: [&[&str]; 4] =
        [&["--help"], &["--version"], &["inspect", fixture, "--tensors"], &["plan", fixture, "--json"]];
    for arguments in lines {
        assert!(
            !shell(arguments).output().unwrap().stdout.is_empty(),
            "{arguments:?} writes nothing, so it proves nothing"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = shell(arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {message}");
        assert!(!message.contains("panicked") && !message.contains("error:"), "{arguments:?}: {message}");
    }
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
        (&llava, &output, &["--tp", "3"], "--tp 3"),
        (&llava, &output, &["--target", "tensorrt,rtx"], "a directory holds engines of one kind"),
        (&llava, &output, &["--mark", "**.nothing"], "--mark `**.nothing`: it matches no layer"),
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
