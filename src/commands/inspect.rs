//! `inspect`: what a path holds.
use super::eval::unreadable;
use crate::checkpoint::{Checkpoint, open_weights};
use crate::cli::{InspectArgs, Target};
use crate::engine_dir::{EngineDirectory, manifest};
use crate::failure::{Exit, Failure};
use crate::report::{Printer, bytes, table};
use crate::runtime;
use serde_json::{Value, json};
use std::path::Path;

pub fn run(args: &InspectArgs, printer: &Printer) -> Result<(), Failure> {
    let path = &args.path;
    if path.join(manifest::NAME).is_file() && args.layers {
        layers(&EngineDirectory::open(path)?, printer)
    } else if path.join(manifest::NAME).is_file() {
        directory(&EngineDirectory::open(path)?, printer)
    } else if path.is_dir() {
        checkpoint(path, args.tensors, printer)
    } else if path.extension().is_some_and(|extension| extension == "engine") {
        engine(path, printer)
    } else {
        let message = format!("`{}` is no engine directory, engine or checkpoint folder", path.display());
        Err(Failure::new(Exit::Refused, message)
            .hint(Some("name a folder that `build` wrote, one of its .engine files, or a checkpoint".into())))
    }
}

/// Every file is compared with its digest.
fn directory(directory: &EngineDirectory, printer: &Printer) -> Result<(), Failure> {
    directory.check()?;
    let manifest = &directory.manifest;
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "kind": "engine_directory", "manifest": manifest }));
        return Ok(());
    }
    let config = directory.config(directory.language())?;
    let sizes = config.build_config;
    printer.data(&format!(
        "{} ({}), {}, built {}",
        manifest.model, manifest.model_type, manifest.dtype, manifest.built_at
    ));
    for (network, recipe) in &manifest.quantization {
        printer.data(&format!("{network}: quantization {recipe}"));
    }
    for (target, entry) in &manifest.targets {
        let by = entry.library.as_ref().map(|library| format!(", {library}, for {}", entry.gpus.join(" ")));
        printer.data(&format!("target {target}{}", by.unwrap_or_default()));
    }
    printer.data(&format!(
        "at most {} requests, {} prompt and {} new tokens, {} rows of picture features",
        sizes.max_batch_size, sizes.max_input_len, sizes.max_output_len, sizes.max_prompt_embedding_table_size
    ));
    let rows: Vec<Vec<String>> = manifest
        .files
        .iter()
        .map(|(name, file)| vec![name.clone(), bytes(file.bytes), file.sha256.chars().take(16).collect()])
        .collect();
    printer.data(&table(&["file (all as in the manifest)", "size", "SHA-256"], &rows));
    Ok(())
}

/// One object, from each network to TensorRT's description of its engine.
fn layers(directory: &EngineDirectory, printer: &Printer) -> Result<(), Failure> {
    super::run::check_target(directory, Target::Tensorrt)?;
    let described: serde_json::Map<String, Value> = runtime::layers(directory)?
        .into_iter()
        .map(|(network, text)| (network, serde_json::from_str(&text).unwrap_or(Value::String(text))))
        .collect();
    printer.json(&json!({ "schema": 1, "kind": "engine_layers", "networks": described }));
    Ok(())
}

fn checkpoint(path: &Path, tensors: bool, printer: &Printer) -> Result<(), Failure> {
    let config = path.join("config.json").is_file();
    let weights = if config { None } else { Some(open_weights(path)?) };
    let checkpoint = if config { Some(Checkpoint::open_folder(path)?) } else { None };
    let weights = match (&weights, &checkpoint) {
        (Some(weights), _) => weights,
        (_, Some(checkpoint)) => checkpoint.weights(),
        _ => return Ok(()),
    };
    let architecture =
        checkpoint.as_ref().and_then(|checkpoint| checkpoint.config().get("architectures")?.get(0)?.as_str());
    let quantization = checkpoint.as_ref().and_then(Checkpoint::quantization);
    let total: u64 = weights.tensors().map(|(_, entry)| entry.bytes).sum();
    if printer.is_json() {
        let list: Vec<_> = weights
            .tensors()
            .map(|(name, entry)| json!({ "name": name, "dtype": entry.dtype, "shape": entry.shape, "bytes": entry.bytes }))
            .collect();
        let files: Vec<_> = weights.files().collect();
        printer.json(&json!({
            "schema": 1, "kind": "checkpoint", "architecture": architecture, "files": files, "bytes": total,
            "tensors": list, "quantization": quantization,
            "ranks": checkpoint.as_ref().and_then(Checkpoint::ranks),
        }));
        return Ok(());
    }
    let (files, count) = (weights.files().len(), weights.tensors().len());
    printer.data(&format!(
        "{}: {count} tensors in {files} files, {}",
        architecture.unwrap_or("no architecture named"),
        bytes(total)
    ));
    if let Some(ranks) = checkpoint.as_ref().and_then(Checkpoint::ranks) {
        printer.data(&format!("TensorRT-LLM's format, {ranks} ranks, their tensors as joined"));
    }
    if let Some(quantization) = quantization {
        printer.data(&format!("quantized by {quantization}"));
    }
    if tensors {
        let rows: Vec<Vec<String>> = weights
            .tensors()
            .map(|(name, entry)| {
                vec![name.to_owned(), entry.dtype.to_string(), format!("{:?}", entry.shape), bytes(entry.bytes)]
            })
            .collect();
        printer.data(&table(&["tensor", "dtype", "shape", "bytes"], &rows));
    }
    Ok(())
}

/// A plan tells its GPUs in readable text; the rest of it only TensorRT reads.
fn engine(path: &Path, printer: &Printer) -> Result<(), Failure> {
    let content = std::fs::read(path).map_err(unreadable(path))?;
    let mark = b"accelerators={";
    let start = content.windows(mark.len()).position(|window| window == mark).map(|place| place + mark.len());
    let end = start.and_then(|start| content.iter().skip(start).position(|&byte| byte == b'}').map(|end| start + end));
    let gpus = match (start, end) {
        (Some(start), Some(end)) => String::from_utf8_lossy(&content[start..end]).trim().to_owned(),
        _ => String::new(),
    };
    let size = content.len() as u64;
    if printer.is_json() {
        let gpus: Vec<&str> = gpus.split_whitespace().collect();
        printer.json(&json!({ "schema": 1, "kind": "engine", "bytes": size, "gpus": gpus }));
    } else {
        let gpus = if gpus.is_empty() { "no GPUs named (not a TensorRT-RTX plan?)".to_owned() } else { gpus };
        printer.data(&format!("engine of {}, for {gpus}", bytes(size)));
    }
    Ok(())
}
