//! `demo`: the main job on a machine without a GPU: build, then answer about a picture.
use super::build::{Built, build};
use super::{backend as backend_command, run as run_command};
use crate::cli::{BuildArgs, DTypeChoice, DemoArgs, EmbeddingSharding, ModelOptions, QualityArgs, RankArgs, Target};
use crate::compile::KvCache;
use crate::engine_dir::{EngineDirectory, Manifest};
use crate::failure::{Exit, Failure};
use crate::processor::Picture;
use crate::report::{Printer, bytes, table};
use crate::runtime::{AnswerOptions, Ask};
use std::path::{Path, PathBuf};

/// A tiny LLaVA with random weights: nothing sensible comes out of it, but everything runs.
const TINY: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../fixtures/llava-hf/config.json")),
    ("generation_config.json", include_bytes!("../../fixtures/llava-hf/generation_config.json")),
    ("model.safetensors", include_bytes!("../../fixtures/llava-hf/model.safetensors")),
    ("preprocessor_config.json", include_bytes!("../../fixtures/llava-hf/preprocessor_config.json")),
    ("processor_config.json", include_bytes!("../../fixtures/llava-hf/processor_config.json")),
    ("tokenizer.json", include_bytes!("../../fixtures/llava-hf/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../fixtures/llava-hf/tokenizer_config.json")),
];

const QUESTION: &str = "What is written?";

pub fn run(args: &DemoArgs, printer: &Printer) -> Result<(), Failure> {
    let io = |error: std::io::Error| Failure::of(Exit::Environment, &error);
    let temporary = tempfile::tempdir().map_err(io)?;
    let output = args.output.clone().unwrap_or_else(|| temporary.path().join("engines"));
    backend_command::install("rtx", false, None, printer)?;

    printer.data("A tiny LLaVA with random weights, as float16 and as INT4:");
    let tiny = temporary.path().join("tiny-llava");
    std::fs::create_dir(&tiny).map_err(io)?;
    for (name, content) in TINY {
        std::fs::write(tiny.join(name), content).map_err(io)?;
    }
    demonstrate(&tiny, &output.join("tiny"), "", &striped(), printer)?;

    match &args.model {
        Some(model) => {
            printer.data(&format!("\nA model that reads, {}:", model.display()));
            let picture = model.join("picture.png");
            let picture = if picture.is_file() { Picture::open(&picture)? } else { sample(model)? };
            demonstrate(model, &output.join("reader"), QUESTION, &picture, printer)?;
        }
        None => {
            printer.data("\nNo checkpoint that really reads is at hand: name one with --model or TRTVLM_DEMO_MODEL.")
        }
    }
    printer.data(
        "\nFor a real model:\n  trtvlm build llava-hf/llava-1.5-7b-hf -o engines --quant int4 --gpu sm89\n  \
         trtvlm run engines --image picture.png --prompt \"What is shown?\"",
    );
    Ok(())
}

/// Builds a model twice, shows what was built, asks both the same and says how they agree.
fn demonstrate(
    model: &Path,
    output: &Path,
    question: &str,
    picture: &Picture,
    printer: &Printer,
) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut answers = Vec::new();
    for quant in ["none", "int4"] {
        let directory = output.join(quant);
        let Built { manifest, .. } = build(&arguments(model, quant, &directory), printer)?;
        let mut session =
            run_command::open(&EngineDirectory::open(&directory)?, Some(Target::Reference), &RankArgs::default())?;
        let prompt = if question.is_empty() { "What is shown?" } else { question };
        let ask = Ask { prompt, pictures: std::slice::from_ref(picture) };
        let options = AnswerOptions { max_new_tokens: Some(24), chat: false };
        let (answer, _) = session.answer(&[ask], options, &mut |_, _| {})?;
        rows.push(row(quant, &manifest));
        answers.extend(answer);
    }
    printer.data(&table(&["quantization", "RTX engines", "reference weights", "library", "GPUs"], &rows));
    if let [plain, quantized] = &answers[..] {
        let same = std::iter::zip(&plain.token_ids, &quantized.token_ids).take_while(|(a, b)| a == b).count();
        printer.data(&format!("float16 answers `{}`", plain.text));
        printer.data(&format!("INT4 answers    `{}`", quantized.text));
        printer.data(&format!("they agree on the first {same} of {} tokens", plain.token_ids.len()));
    }
    Ok(())
}

fn arguments(model: &Path, quant: &str, output: &Path) -> BuildArgs {
    BuildArgs {
        quality: QualityArgs::default(),
        options: ModelOptions {
            model: model.display().to_string(),
            language: None,
            vision_tower: None,
            tokenizer: None,
            target: vec![Target::Rtx, Target::Reference],
            gpu: vec![89],
            dtype: DTypeChoice(Some(graphs::DType::Float16)),
            quant: quant.to_owned(),
            vision_quant: "none".to_owned(),
            calibration: None,
            kv_cache: KvCache::Auto,
            tp: 1,
            embedding_sharding: EmbeddingSharding::Vocab,
            max_batch_size: 1,
            max_input_len: None,
            max_output_len: None,
            max_multimodal_len: None,
        },
        output: output.to_path_buf(),
        timeout: None,
        jobs: 1,
        optimization_level: None,
        dump: None,
        mark: Vec::new(),
    }
}

fn row(quant: &str, manifest: &Manifest) -> Vec<String> {
    let size = |end: &str| {
        let files = manifest.files.iter().filter(|(name, _)| name.ends_with(end));
        bytes(files.map(|(_, file)| file.bytes).sum())
    };
    let rtx = manifest.targets.get("rtx").cloned().unwrap_or_default();
    vec![
        quant.to_owned(),
        size(".engine"),
        size("weights.safetensors"),
        rtx.library.unwrap_or_default(),
        rtx.gpus.join(" "),
    ]
}

/// A small picture made of stripes.
fn striped() -> Picture {
    let rgb = (0..64 * 48).flat_map(|place| {
        let (x, y) = (place % 64, place / 64);
        [(x * 4) as u8, (y * 5) as u8, if (x / 8 + y / 8) % 2 == 0 { 255 } else { 0 }]
    });
    Picture { width: 64, height: 48, rgb: rgb.collect() }
}

/// The first picture of the evaluation set beside the trained checkpoints.
fn sample(model: &Path) -> Result<Picture, Failure> {
    let set: PathBuf = model.join("../evaluation-square.safetensors");
    super::eval::picture_file(&set)?
        .into_iter()
        .next()
        .ok_or_else(|| Failure::new(Exit::Refused, format!("`{}` holds no picture", set.display())))
}
