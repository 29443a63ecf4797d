//! `convert`: a checkpoint in TensorRT-LLM's format, divided among ranks.
use super::build::compile_reported;
use crate::cli::ConvertArgs;
use crate::compile::{Chosen, KvCache, Request};
use crate::convert::{ConvertError, Order, convert};
use crate::engine_dir::{DirectoryError, SizeRequest};
use crate::failure::{Exit, Failure};
use crate::report::{Printer, Progress, bytes};
use graphs::Logits;
use serde_json::json;
use std::time::Instant;

pub fn run(args: &ConvertArgs, printer: &Printer) -> Result<(), Failure> {
    let start = Instant::now();
    let request = Request {
        model: args.model.clone(),
        language: args.language.clone(),
        vision_tower: args.vision_tower.clone(),
        tokenizer: args.tokenizer.clone(),
        dtype: args.dtype.0,
        quant: "none".into(),
        vision_quant: "none".into(),
        chosen: Chosen::default(),
        calibration: None,
        kv_cache: KvCache::Auto,
        // Engines are not at stake: the format shares tensors in its own way.
        tp: 1,
        divide_embedding: false,
        sizes: SizeRequest { max_batch_size: 1, ..SizeRequest::default() },
        logits: Logits::Last,
        dump: None,
        marks: Vec::new(),
    };
    let compiled = compile_reported(&request, printer)?;
    let source = &compiled.source;
    if source.facts().pictures.is_some() {
        printer
            .note("TensorRT-LLM's format holds the language part; pictures' networks are built from the model itself");
    }
    let order = Order { source, ranks: args.tp, dtype: args.dtype.0, output: &args.output };
    let mut bar: Option<(String, Progress)> = None;
    let mut progress = |file: &str, done, total| {
        if bar.as_ref().is_none_or(|(shown, _)| shown != file) {
            bar = None;
            bar = Some((file.to_owned(), printer.progress("Writing", file, total)));
        }
        if let Some((_, bar)) = &bar {
            bar.set(done, total);
        }
    };
    let summary = convert(&order, &mut progress).map_err(failure)?;
    drop(bar);
    let name = args.output.display();
    if printer.is_json() {
        printer.json(&json!({
            "schema": 1, "kind": "trtllm_checkpoint", "folder": args.output, "ranks": args.tp, "files": summary.files,
            "tensors": summary.tensors, "bytes": summary.bytes, "seconds": start.elapsed().as_secs_f64(),
        }));
    } else {
        printer.data(&format!(
            "{name}: {} tensors in {}, {}",
            summary.tensors,
            summary.files.join(", "),
            bytes(summary.bytes)
        ));
    }
    Ok(())
}

fn failure(error: ConvertError) -> Failure {
    let exit = match &error {
        ConvertError::Directory(DirectoryError::Io { .. }) => Exit::Environment,
        _ => Exit::Refused,
    };
    Failure::of(exit, &error).hint(error.hint())
}
