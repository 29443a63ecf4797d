//! Reports on quality, bounds and chosen formats through the binary, against sums written a second time.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Shape and values.
type Tensor = (Vec<usize>, Vec<f64>);

/// The float32 tensors of a file.
fn tensors(file: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(file).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = file.iter().filter(|(_, view)| view.dtype() == safetensors::Dtype::F32);
    let value = |bytes: &[u8]| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()));
    floats
        .map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().chunks(4).map(value).collect())))
        .collect()
}

/// To nearest, in groups that have the largest magnitude / `limit` as their scale.
fn rounded(weights: &[f64], group: usize, limit: f64) -> Vec<f64> {
    let round = |group: &[f64]| {
        let scale = f64::from((group.iter().fold(0.0, |most: f64, value| most.max(value.abs())) / limit) as f32);
        group.iter().map(|value| (value / scale).round_ties_even() * scale).collect::<Vec<f64>>()
    };
    weights.chunks(group).flat_map(round).collect()
}

/// Norm of the differences over that of what was.
fn relative(wanted: &[f64], found: &[f64]) -> f64 {
    let off: f64 = std::iter::zip(wanted, found).map(|(wanted, found)| (wanted - found).powi(2)).sum();
    (off / wanted.iter().map(|value| value * value).sum::<f64>()).sqrt()
}

/// X W^T, both with rows of `width`.
fn product(inputs: &[f64], weights: &[f64], width: usize) -> Vec<f64> {
    let outputs = |row: &[f64]| {
        let dot = |column: &[f64]| std::iter::zip(row, column).map(|(x, w)| x * w).sum();
        weights.chunks(width).map(dot).collect::<Vec<f64>>()
    };
    inputs.chunks(width).flat_map(outputs).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `plan --json` with flags.
fn plan(model: &Path, flags: &[&str]) -> Value {
    let all = [&["plan", text(model), "--json", "-q"], flags].concat();
    serde_json::from_slice(&succeed(&all).stdout).unwrap()
}

fn layers(answer: &Value) -> &Vec<Value> {
    answer["quality"]["layers"].as_array().unwrap()
}

fn layer<'a>(answer: &'a Value, path: &str) -> &'a Value {
    layers(answer).iter().find(|layer| layer["path"] == path).unwrap()
}

fn calibrate(model: &Path, root: &Path) -> PathBuf {
    let [prose, statistics] = ["prose.txt", "statistics.safetensors"].map(|name| root.join(name));
    std::fs::write(&prose, "the quick brown fox jumps over the lazy dog, and why? because. ".repeat(12)).unwrap();
    succeed(&["calibrate", text(model), "--data", text(&prose), "-o", text(&statistics), "-q", "--window", "16"]);
    statistics
}

#[test]
fn errors_and_bytes_are_those_of_a_second_computation() {
    let root = tempfile::tempdir().unwrap();
    let (model, page, engines) = (fixture("llava-hf"), root.path().join("page.html"), root.path().join("engines"));
    let known: BTreeMap<String, Tensor> = tensors(&model.join("model.safetensors"))
        .into_iter()
        .map(|(name, tensor)| (name.replace("vision_tower.", "vision_tower.vision_model."), tensor))
        .collect();
    // Matrices that linear layers have; of the last vision layer nothing is read.
    let linear = |(name, (shape, _)): (&String, &Tensor)| {
        let other = shape.len() != 2 || name.contains("embed") || name.contains("encoder.layers.2.");
        name.strip_suffix(".weight").filter(|_| !other).map(str::to_owned)
    };
    let paths: BTreeSet<String> = known.iter().filter_map(linear).collect();
    for (quant, limit, group) in [("int8", 127.0, None), ("int4-g16", 7.0, Some(16))] {
        let flags = ["--quant", quant, "--report", text(&page)];
        let answer = plan(&model, &flags);
        let html = std::fs::read_to_string(&page).unwrap();
        let found: Vec<&str> = layers(&answer).iter().map(|layer| layer["path"].as_str().unwrap()).collect();
        assert_eq!((found.len(), found.iter().map(|path| (*path).to_owned()).collect()), (paths.len(), paths.clone()));
        let (mut before, mut after, mut worst) = (0, 0, ("", 0.0));
        for path in found {
            let (shape, values) = &known[&format!("{path}.weight")];
            let (layer, weights) = (layer(&answer, path), values.len());
            let kept = !path.contains("language_model.model.layers.");
            let group = group.unwrap_or(shape[1]);
            let error = if kept { 0.0 } else { relative(values, &rounded(values, group, limit)) };
            let reported = layer["relative_error"].as_f64().unwrap();
            assert!((reported - error).abs() <= 1e-5 * error, "{path}: {reported}, wanted {error}");
            let stored = if quant == "int8" { weights } else { weights / 2 } + weights / group * 4;
            let bytes = [4 * weights, if kept { 4 * weights } else { stored }];
            assert_eq!([&layer["bytes_before"], &layer["bytes_after"]], [bytes[0], bytes[1]], "{path}");
            assert_eq!(
                (&layer["shape"], &layer["error_of"]),
                (&json!(shape), &json!(if kept { "exact" } else { "weights" }))
            );
            (before, after) = (before + bytes[0], after + bytes[1]);
            if reported > worst.1 {
                worst = (path, reported);
            }
            let shown = if kept { "exact (exact)".to_owned() } else { format!("{error:.4} (weights)") };
            assert!(html.contains(&format!("title=\"{path}: error {shown}")), "{path} in {html}");
        }
        let quality = &answer["quality"];
        assert_eq!([&quality["bytes_before"], &quality["bytes_after"]], [before, after]);
        assert_eq!(
            (quality["worst_layer"].as_str(), quality["largest_relative_error"].as_f64()),
            (Some(worst.0), Some(worst.1))
        );
        for outside in
            ["http:", "https:", "//", "url(", "@import", "<script", "<link", "<img", "<iframe", "src=", "href="]
        {
            assert!(!html.contains(outside), "`{outside}` in {html}");
        }
        assert!(html.starts_with("<!DOCTYPE html>") && html.contains("of the weights themselves"));
        // A build says the same.
        let build = ["build", text(&model), "-o", text(&engines), "--target", "reference", "--json", "-q"];
        let built: Value = serde_json::from_slice(&succeed(&[&build[..], &flags].concat()).stdout).unwrap();
        assert_eq!(&built["quality"], quality);
        assert_eq!(std::fs::read_to_string(&page).unwrap(), html);
    }
}

#[test]
fn with_statistics_errors_are_of_outputs() {
    let root = tempfile::tempdir().unwrap();
    let (model, page) = (fixture("llava-hf"), root.path().join("page.html"));
    let statistics = calibrate(&model, root.path());
    let (weights, seen) = (tensors(&model.join("model.safetensors")), tensors(&statistics));
    let with = |quant| plan(&model, &["--quant", quant, "--calibration", text(&statistics), "--report", text(&page)]);
    let nearest = with("int4-g16");
    for (name, input) in [
        ("self_attn.k_proj", "input_layernorm"),
        ("self_attn.o_proj", "self_attn.attention"),
        ("mlp.gate_proj", "post_attention_layernorm"),
        ("mlp.down_proj", "mlp.up_proj/binary"),
    ] {
        let path = format!("language_model.model.layers.1.{name}");
        let (shape, values) = &weights[&format!("{path}.weight")];
        let (_, rows) = &seen[&format!("language/language_model.model.layers.1.{input}.rows")];
        let rows = &rows[..128 * shape[1]];
        let [wanted, found] = [values, &rounded(values, 16, 7.0)].map(|values| product(rows, values, shape[1]));
        let (error, layer) = (relative(&wanted, &found), layer(&nearest, &path));
        let reported = layer["relative_error"].as_f64().unwrap();
        assert!((reported / error - 1.0).abs() < 1e-4, "{path}: {reported}, wanted {error}");
        assert_eq!((&layer["error_of"], &layer["rows"]), (&json!("outputs"), &json!(128)));
    }
    assert!(std::fs::read_to_string(&page).unwrap().contains("of the layers&#39; outputs for 128 rows"));
    // What is searched for with these rows loses less of them, and says where its factors went.
    let searched = with("int4-awq-g16");
    let sum =
        |answer: &Value| layers(answer).iter().map(|layer| layer["relative_error"].as_f64().unwrap()).sum::<f64>();
    assert!(sum(&searched) < sum(&nearest), "{} {}", sum(&searched), sum(&nearest));
    assert!(layers(&searched).iter().any(|layer| layer["factors"] == "folded"));
    assert!(layers(&nearest).iter().all(|layer| layer["factors"].is_null()));
}

/// The recipe that a refusal prints.
fn printed(message: &str) -> String {
    let start = message.find("name = ").unwrap_or_else(|| panic!("no recipe in {message}"));
    message[start..].to_owned()
}

#[test]
fn a_bound_is_held_and_what_it_prints_keeps_to_it() {
    let root = tempfile::tempdir().unwrap();
    let model = fixture("llava-hf");
    let [engines, page, file, vision] =
        ["engines", "page.html", "kept.toml", "vision.toml"].map(|name| root.path().join(name));
    let base = ["build", text(&model), "-o", text(&engines), "--target", "reference", "-q", "--max-error"];
    for quant in ["int4-g16", "int8", "auto:6.5"] {
        let answer = plan(&model, &["--quant", quant, "--report", text(&page)]);
        let mut errors: Vec<(f64, &str)> = layers(&answer)
            .iter()
            .map(|own| (own["relative_error"].as_f64().unwrap(), own["path"].as_str().unwrap()))
            .collect();
        errors.sort_by(|a, b| b.0.total_cmp(&a.0));
        let bound = f64::midpoint(errors[2].0, errors[3].0).to_string();
        let (code, message) = refuse(&[&base[..], &[&bound, "--quant", quant]].concat());
        assert!(
            code == 4 && message.contains(&format!("3 of 29 layers are off by more than --max-error {bound}")),
            "{message}"
        );
        assert!(message.contains(&format!("cause: `{}`", errors[0].1)), "{message}");
        assert!(!engines.exists(), "{quant}");
        let (code, _) = refuse(&["plan", text(&model), "-q", "--quant", quant, "--max-error", &bound]);
        assert_eq!(code, 4);
        std::fs::write(&file, printed(&message)).unwrap();
        let kept = [&base[..], &[&bound, "--quant", text(&file), "--json"]].concat();
        let built: Value = serde_json::from_slice(&succeed(&kept).stdout).unwrap();
        for (place, (error, path)) in errors.iter().enumerate() {
            let wanted = if place < 3 { 0.0 } else { *error };
            assert_eq!(layer(&built, path)["relative_error"], wanted, "{path} of {quant}");
        }
        std::fs::remove_dir_all(&engines).unwrap();
    }
    // Factors that kept layers shared would be others for the rest, so these are kept too.
    let statistics = calibrate(&model, root.path());
    let searched = ["--calibration", text(&statistics), "--report", text(&page), "--quant"];
    let answer = plan(&model, &[&searched[..], &["int4-awq-g16"]].concat());
    let mut errors: Vec<f64> = layers(&answer).iter().map(|own| own["relative_error"].as_f64().unwrap()).collect();
    errors.sort_by(|a, b| b.total_cmp(a));
    for pair in errors[..14].windows(2) {
        let bound = f64::midpoint(pair[0], pair[1]).to_string();
        let asked = [&["plan", text(&model), "-q", "--max-error", &bound], &searched[..]].concat();
        let (code, message) = refuse(&[&asked[..], &["int4-awq-g16"]].concat());
        assert_eq!(code, 4);
        std::fs::write(&file, printed(&message)).unwrap();
        succeed(&[&asked[..], &[text(&file)]].concat());
    }
    // Both parts at once, each with a recipe of its own; as JSON the message is on standard output.
    let output =
        trtvlm(&[&base[..], &["0.01", "--quant", "int4-g16", "--vision-quant", "int4-g16", "--json"]].concat());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &answer["error"]["exit"]), (Some(4), &json!(4)));
    assert!(layers(&answer).len() == 29 && !engines.exists());
    let hint = answer["error"]["hint"].as_str().unwrap();
    let (language, other) = hint.split_once("\nkeep them as they are, with --vision-quant").unwrap();
    std::fs::write(&file, printed(language)).unwrap();
    std::fs::write(&vision, printed(other)).unwrap();
    succeed(&[&base[..], &["0.01", "--quant", text(&file), "--vision-quant", text(&vision)]].concat());
}

/// A LLaMA whose layers differ in what they lose: some have few very large weights.
fn uneven(root: &Path) -> PathBuf {
    let config = llama_config(json!({}));
    let mut tensors = random_tensors(&config);
    for (name, (_, values)) in
        tensors.iter_mut().filter(|(name, _)| name.contains("layers.1.") && !name.contains("norm"))
    {
        values.iter_mut().step_by(61 + name.len()).for_each(|value| *value *= 9.0);
    }
    let folder = root.join("uneven");
    write_checkpoint(&folder, &config, &tensors, DType::Float32, 1);
    folder
}

/// Bits a weight of the layers that presets would quantize, and the sum of the squared errors.
fn cost_and_loss(answer: &Value) -> (f64, f64) {
    let of = |layer: &&Value| !layer["path"].as_str().unwrap().ends_with("lm_head");
    let own: Vec<&Value> = layers(answer).iter().filter(of).collect();
    let sum = |name: &str| own.iter().map(|layer| layer[name].as_f64().unwrap()).sum::<f64>();
    let loss = own.iter().map(|layer| layer["relative_error"].as_f64().unwrap().powi(2)).sum();
    (sum("bytes_after") * 8.0 / (sum("bytes_before") / 4.0), loss)
}

#[test]
fn chosen_formats_keep_the_budget_and_win_by_more_bits() {
    let root = tempfile::tempdir().unwrap();
    let (model, page, file) = (uneven(root.path()), root.path().join("page.html"), root.path().join("recipe.toml"));
    let statistics = calibrate(&model, root.path());
    let report = ["--report", text(&page)];
    for (flags, method) in [(&["--calibration", text(&statistics)][..], "int4-awq"), (&[], "int4-mse")] {
        let (mut last, mut apart) = (f64::INFINITY, false);
        for bits in [5.0, 5.3, 6.0, 7.0, 8.5, 12.0, 20.0, 32.0] {
            let answer = plan(&model, &[&report, flags, &["--quant", &format!("auto:{bits}")]].concat());
            let recipe = answer["recipes"]["language"].as_str().unwrap();
            assert_eq!(recipe.contains(method), bits < 8.0, "{recipe}");
            // The measure is of what is rounded to nearest.
            std::fs::write(&file, recipe.replace(method, "int4")).unwrap();
            let nearest = plan(&model, &[&report, flags, &["--quant", text(&file)]].concat());
            let ((cost, _), (same, loss)) = (cost_and_loss(&answer), cost_and_loss(&nearest));
            assert!(cost <= bits && cost == same, "auto:{bits} takes {cost} {same}");
            assert!(loss <= last, "auto:{bits} loses {loss}, less bits {last}");
            last = loss;
            let format = |name: &str| &layer(&answer, name)["format"];
            for (number, (one, others)) in [0, 1].into_iter().flat_map(|number| {
                [("self_attn.q", ["self_attn.k", "self_attn.v"]), ("mlp.gate", ["mlp.up"; 2])]
                    .map(|names| (number, names))
            }) {
                let path = |name: &str| format!("model.layers.{number}.{name}_proj");
                apart |= others.iter().any(|other| format(&path(one)) != format(&path(other)));
            }
        }
        assert_eq!(last, 0.0, "32 bits are the model's own");
        assert_eq!(apart, flags.is_empty(), "with statistics layers of one input have one format");
    }
}

#[test]
fn choices_repeat_themselves_and_build_the_same_as_their_recipes() {
    let root = tempfile::tempdir().unwrap();
    let model = fixture("llava-hf");
    let [chosen, again] = ["chosen", "again"].map(|name| root.path().join(name));
    let choice = ["--quant", "auto:6.5", "--vision-quant", "auto:7"];
    let with = |threads: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trtvlm"));
        let output = command
            .args(["plan", text(&model), "--json", "-q"])
            .args(choice)
            .env("RAYON_NUM_THREADS", threads)
            .output();
        serde_json::from_slice::<Value>(&output.unwrap().stdout).unwrap()["recipes"].clone()
    };
    let recipes = with("1");
    assert_eq!(with("2"), recipes);
    build_reference(&model, &chosen, &choice);
    let files =
        [("language", "recipe.toml"), ("vision", "vision-recipe.toml")].map(|(part, name)| (part, chosen.join(name)));
    for (part, file) in &files {
        assert_eq!(std::fs::read_to_string(file).unwrap(), recipes[*part].as_str().unwrap());
    }
    build_reference(&model, &again, &["--quant", text(&files[0].1), "--vision-quant", text(&files[1].1)]);
    let [mut chosen, mut again] = [chosen, again].map(|folder| contents(&folder));
    for name in ["manifest.json", "recipe.toml", "vision-recipe.toml"] {
        assert_eq!(chosen.remove(name).is_some(), again.remove(name).is_some() || name != "manifest.json");
    }
    assert!(chosen == again && chosen.len() > 4, "{:?}", chosen.keys());
    // Ranks get whole groups of what is chosen for them.
    for ranks in ["2", "4"] {
        assert!(
            plan(&model, &["--tp", ranks, "--quant", "auto:7"])["recipes"]["language"]
                .as_str()
                .unwrap()
                .contains("int4")
        );
    }
}

#[test]
fn what_is_no_budget_is_refused() {
    let model = fixture("llava-hf");
    for bits in ["", "x", "0.5", "33", "NaN", "inf", "-6", "6 "] {
        let (code, message) = refuse(&["plan", text(&model), "--quant", &format!("auto:{bits}")]);
        assert!(
            code == 1
                && message.contains("a number of bits from 1 to 32")
                && message.contains("hint: as in `auto:5.5`"),
            "{message}"
        );
    }
    let (code, message) = refuse(&["plan", text(&model), "--quant", "auto:4"]);
    let (_, hint) = message.split_once("hint: ask for `").unwrap_or_else(|| panic!("{message}"));
    assert_eq!(code, 1);
    succeed(&["plan", text(&model), "--quant", hint.split_once('`').unwrap().0]);
}
