//! `synth`: a checkpoint of a real shape with random weights.
use crate::cli::SynthArgs;
use crate::failure::{Exit, Failure};
use crate::report::{Printer, bytes};
use crate::synth::{Order, SynthError, find, write};
use serde_json::json;
use std::time::Instant;

pub fn run(args: &SynthArgs, printer: &Printer) -> Result<(), Failure> {
    let config = find(&args.config).map_err(failure)?;
    let order = Order { config, dtype: args.dtype, seed: args.seed, layers: args.layers };
    let start = Instant::now();
    let name = args.output.display();
    let progress = printer.progress("Drawing", &format!("weights of {name}"), 1);
    let summary = write(&order, &args.output, &|done, total| progress.set(done, total)).map_err(failure)?;
    let text = format!("{} values as {}, {}", summary.values, args.dtype, bytes(summary.bytes));
    printer.finish(progress, "Drawing", &text);
    let seconds = start.elapsed().as_secs_f64();
    if printer.is_json() {
        printer.json(&json!({
            "schema": 1, "kind": "checkpoint", "folder": args.output, "dtype": args.dtype, "seed": args.seed,
            "files": summary.files, "tensors": summary.tensors, "values": summary.values, "bytes": summary.bytes,
            "seconds": seconds,
        }));
    } else {
        printer.note(&format!("{:.1} million values a second", summary.values as f64 / seconds.max(1e-9) / 1e6));
        printer.data(&format!("{name}: {} tensors in {}", summary.tensors, summary.files.join(", ")));
    }
    Ok(())
}

fn failure(error: SynthError) -> Failure {
    let exit = if matches!(error, SynthError::Write { .. }) { Exit::Environment } else { Exit::Refused };
    Failure::of(exit, &error).hint(error.hint())
}
