//! `calibrate`: statistics of what a model's layers read, for quantization that needs them.
use super::build::compile_reported;
use super::eval::{Task, lesson, sampler_config};
use crate::builder::status_bytes;
use crate::calibration::{GatherOptions, GpuError, Machine, fingerprint, gather};
use crate::cli::{CalibrateArgs, DeviceChoice};
use crate::compile::{Chosen, KvCache, Request};
use crate::device::DeviceError;
use crate::engine_dir::SizeRequest;
use crate::failure::{Exit, Failure};
use crate::processor::Processor;
use crate::report::{Printer, bytes};
use crate::samples::Sampler;
use graphs::Logits;
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Instant;

pub fn run(args: &CalibrateArgs, printer: &Printer) -> Result<(), Failure> {
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
        tp: 1,
        divide_embedding: true,
        // Prompts as long as the model takes them.
        sizes: SizeRequest { max_batch_size: 1, max_output_len: Some(1), ..SizeRequest::default() },
        logits: Logits::Last,
        dump: None,
        marks: Vec::new(),
    };
    let compiled = compile_reported(&request, printer)?;
    let processor = Processor::open_parts(&compiled.source.folders())?;
    let config = sampler_config(&compiled);
    let window = args.window.min(compiled.source.facts().max_positions);
    let sampler = Sampler { processor: &processor, config: &config, window };
    let samples = match (&args.references, &args.task) {
        (Some(references), Some(task)) => Task::read(&args.data, references, task)?.samples(&sampler, args.samples)?,
        (None, None) => sampler.read(&args.data, args.samples)?,
        _ => {
            return Err(Failure::new(Exit::Refused, "a file of pictures comes with --references and --task")
                .hint(Some("give both, or a .txt or .jsonl file without them".into())));
        }
    };
    let seeing = samples.iter().any(|sample| !sample.pictures.is_empty());
    let networks = compiled.networks.iter().map(|passed| passed.network.name.as_str());
    let unseen: BTreeSet<&str> = networks.filter(|name| *name == "vision" && !seeing).collect();
    if !unseen.is_empty() {
        printer
            .warning("the samples have no pictures: the vision network is not calibrated, and no picture features are");
    }
    let lesson = lesson(&compiled, &processor);
    let start = Instant::now();
    let machine = match args.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda => Some(Machine::open()?),
        // Without a driver there is nothing to say; a GPU that cannot be used should be known of.
        DeviceChoice::Auto => match Machine::open() {
            Ok(machine) => Some(machine),
            Err(GpuError::Device(DeviceError::NoDriver)) => None,
            Err(error) => {
                printer.warning(&format!("calibrating on the CPU, the GPU cannot be used: {error}"));
                None
            }
        },
    };
    let device = machine.as_ref().map_or_else(|| "CPU".into(), Machine::name);
    let (rows, together) = (args.rows, args.together);
    let options = GatherOptions { rows, together, dtype: compiled.dtype, machine: machine.as_ref() };
    let bar = printer.progress("Calibrating", &args.model, 1);
    let model = fingerprint(&compiled.source)?;
    let progress = |done, total| bar.set(done, total);
    let resumed = gather(&args.output, &lesson, &compiled.source, model, &samples, options, &progress)?;
    if resumed > 0 {
        printer.status("Resumed", &format!("after {resumed} samples of an earlier run"));
    }
    let size = std::fs::metadata(&args.output).map_or(0, |metadata| metadata.len());
    let tokens: usize = samples.iter().map(|sample| sample.prompt.len() + sample.answer.len()).sum();
    let text = format!("{} samples, {tokens} tokens on {device}, {} of statistics", samples.len(), bytes(size));
    printer.finish(bar, "Calibrating", &text);
    if printer.is_json() {
        printer.json(&json!({
            "schema": 1, "statistics": args.output, "samples": samples.len(), "tokens": tokens, "resumed": resumed,
            "device": device, "seconds": start.elapsed().as_secs_f64(), "peak_bytes": status_bytes("self", "VmHWM"),
        }));
    }
    Ok(())
}
