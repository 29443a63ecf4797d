//! `build`: a checkpoint becomes a directory of engines.
use super::{mixed, quality};
use crate::assemble::{Assembly, EngineTarget, Event, assemble};
use crate::backend::{self, Kind};
use crate::builder::{BuildEvent, LocalSpec, Memory, Supervisor, status_bytes};
use crate::checkpoint::{Checkpoint, Download, HubSettings, Options};
use crate::cli::{BuildArgs, EmbeddingSharding, ModelOptions, Target};
use crate::compile::{Chosen, Compiled, KvCache, Request, TOKENIZERS, compile};
use crate::engine_dir::{Manifest, SizeRequest};
use crate::failure::{Exit, Failure};
use crate::lower;
use crate::quality::Layer;
use crate::report::{Printer, Progress, bytes, duration};
use graphs::Logits;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tensorrt_sys::Family;

pub(super) fn request(options: &ModelOptions) -> Request {
    Request {
        model: options.model.clone(),
        language: options.language.clone(),
        vision_tower: options.vision_tower.clone(),
        tokenizer: options.tokenizer.clone(),
        dtype: options.dtype.0,
        quant: options.quant.clone(),
        vision_quant: options.vision_quant.clone(),
        chosen: Chosen::default(),
        calibration: options.calibration.clone(),
        kv_cache: options.kv_cache,
        tp: options.tp,
        divide_embedding: options.embedding_sharding == EmbeddingSharding::Vocab,
        sizes: SizeRequest {
            max_batch_size: options.max_batch_size,
            max_input_len: options.max_input_len,
            max_output_len: options.max_output_len,
            max_multimodal_len: options.max_multimodal_len,
        },
        logits: Logits::Last,
        dump: None,
        marks: Vec::new(),
    }
}

/// The kind of engines that is asked for, with the libraries that it takes.
fn engine_target(args: &BuildArgs) -> Result<Option<EngineTarget>, Failure> {
    let (options, optimization_level) = (&args.options, args.optimization_level);
    let wants = |target| options.target.contains(&target);
    Ok(match (wants(Target::Rtx), wants(Target::Tensorrt)) {
        (true, true) => {
            return Err(Failure::new(Exit::Refused, "a directory holds engines of one kind, rtx or tensorrt")
                .hint(Some("build each into a folder of its own".into())));
        }
        (true, false) => {
            let library = backend::find(Kind::Rtx)?;
            Some(EngineTarget {
                name: Target::Rtx.name(),
                library,
                gpus: gpus(options),
                local: None,
                optimization_level,
            })
        }
        (false, true) => {
            let library = backend::find(Kind::Tensorrt)?;
            let local = LocalSpec { nvrtc: backend::find(Kind::Nvrtc)?, timings: backend::timings_folder() };
            Some(EngineTarget {
                name: Target::Tensorrt.name(),
                library,
                gpus: Vec::new(),
                local: Some(local),
                optimization_level,
            })
        }
        (false, false) => None,
    })
}

pub fn run(args: &BuildArgs, printer: &Printer) -> Result<(), Failure> {
    let Built { manifest, engines, peak_own_bytes, layers } = build(args, printer)?;
    if printer.is_json() {
        let quality = quality::to_json(layers.as_ref());
        printer.json(&json!({
            "schema": 1, "directory": args.output, "manifest": manifest, "engines": engines, "quality": quality,
            "peak_own_memory_bytes": peak_own_bytes,
            "parent_peak_memory_bytes": status_bytes("self", "VmHWM"),
        }));
    }
    Ok(())
}

/// A finished directory.
pub(super) struct Built {
    pub(super) manifest: Manifest,
    /// What each engine took.
    engines: Vec<Value>,
    /// The most that all children together had for themselves.
    peak_own_bytes: u64,
    /// What became of each layer, where that was asked for.
    layers: Option<Vec<Layer>>,
}

/// Builds and reports on standard error; what `demo` does too.
pub(super) fn build(args: &BuildArgs, printer: &Printer) -> Result<Built, Failure> {
    let start = Instant::now();
    let options = &args.options;
    check_kv_cache(options)?;
    let engines = engine_target(args)?;
    let request = Request { dump: args.dump.clone(), marks: args.mark.clone(), ..request(options) };
    quality::check_place(args.quality.report.as_deref())?;
    let request = mixed::resolve(&request, printer)?;
    let mut compiled = compile_reported(&request, printer)?;
    if options.target.contains(&Target::Rtx) {
        check_gpus(&compiled, &gpus(options))?;
    }
    let layers = quality::search_and_measure(&mut compiled, &request, &args.quality, printer)?;
    let interrupted = on_interrupt()?;
    let program = std::env::current_exe().map_err(|error| Failure::of(Exit::Environment, &error))?;
    let memory = Memory::default();
    let supervisor = Supervisor {
        program: &program,
        timeout: args.timeout.map(Duration::from_secs),
        interrupted: &|| interrupted.load(Ordering::Relaxed),
        memory: &memory,
    };
    let assembly = Assembly {
        output: &args.output,
        reference: options.target.contains(&Target::Reference),
        engines,
        supervisor,
        jobs: args.jobs,
        model: name(&options.model),
        command: command(args),
    };
    let mut reporter = Reporter { printer, step: None, working: BTreeMap::new(), engines: BTreeMap::new() };
    let manifest = assemble(&compiled, &assembly, &mut |event| reporter.see(event))?;
    reporter.end();
    let size: u64 = manifest.files.values().map(|file| file.bytes).sum();
    let text = format!("{} ({}) in {}", args.output.display(), bytes(size), duration(start.elapsed()));
    printer.status("Finished", &text);
    let engines = reporter.engines.into_values().collect();
    Ok(Built { manifest, engines, peak_own_bytes: memory.most(), layers })
}

/// Refuses what a target cannot keep.
pub(super) fn check_kv_cache(options: &ModelOptions) -> Result<(), Failure> {
    let family = |target| match target {
        Target::Rtx => Some(Family::Rtx),
        Target::Tensorrt => Some(Family::Ten),
        Target::Reference => None,
    };
    let lacks = |target: &&Target| family(**target).is_some_and(|family| !lower::has_int8_cache(family));
    match options.target.iter().find(lacks) {
        Some(target) if options.kv_cache == KvCache::Int8 => {
            let message =
                format!("--kv-cache int8: target `{}` keeps keys and values in the networks' own type", target.name());
            Err(Failure::new(Exit::Refused, message)
                .hint(Some("use --target tensorrt,reference, or --kv-cache auto".into())))
        }
        _ => Ok(()),
    }
}

/// Where checkpoints may come from, without a word on the way.
pub(super) fn quiet_options() -> Options<'static> {
    Options { hub: HubSettings::from_environment(), progress: None }
}

/// Reads headers and says what was found and decided.
pub(super) fn compile_reported(request: &Request, printer: &Printer) -> Result<Compiled, Failure> {
    let bar: RefCell<Option<(String, Progress)>> = RefCell::new(None);
    let show = |download: Download<'_>| {
        let mut bar = bar.borrow_mut();
        if bar.as_ref().is_none_or(|(file, _)| file != download.file) {
            // The bar of the file before goes first.
            *bar = None;
            *bar = Some((download.file.to_owned(), printer.progress("Fetching", download.file, download.total)));
        }
        if let Some((_, progress)) = bar.as_ref() {
            progress.set(download.done, download.total);
        }
    };
    let options = Options { hub: HubSettings::from_environment(), progress: Some(&show) };
    let compiled = compile(request, &options)?;
    drop(bar.take());
    let source = &compiled.source;
    let (found, ignored) = (source.coverage().found.len(), source.coverage().ignored.len());
    let language = request.language.as_ref().map(|language| format!(" and {language}")).unwrap_or_default();
    let text = format!("{}{language}: {found} tensors used, {ignored} known to be unused", request.model);
    printer.status("Reading", &text);
    for ranks in source.checkpoints().filter_map(Checkpoint::ranks) {
        printer.status("Joining", &format!("the tensors of {ranks} ranks in TensorRT-LLM's format"));
    }
    for quantization in source.checkpoints().filter_map(Checkpoint::quantization) {
        printer.status("Keeping", &format!("its own quantization: {quantization}"));
    }
    if !TOKENIZERS.iter().any(|name| source.folders().iter().any(|folder| folder.join(name).is_file())) {
        printer.warning(
            "the model comes without a tokenizer: `run` will take no text until it is built with --tokenizer DIR",
        );
    }
    for warning in source.checkpoints().flat_map(Checkpoint::warnings) {
        printer.warning(&warning);
    }
    for note in source.checkpoints().flat_map(Checkpoint::notes) {
        printer.note(&note);
    }
    let whole = compiled.networks.iter().filter(|passed| passed.rank == 0);
    for choice in whole.flat_map(|passed| &passed.assignments) {
        if let Some(note) = &choice.note {
            printer.note(&format!("`{}`: {note}", choice.path));
        }
    }
    Ok(compiled)
}

/// Finds the vectors of calibrated quantization.
pub(super) fn search(compiled: &mut Compiled, printer: &Printer) -> Result<(), Failure> {
    let searches = compiled.searches();
    if searches > 0 {
        let bar = printer.progress("Searching", "scales", searches as u64);
        compiled.search(&|done, total| bar.set(done, total))?;
        printer.finish(bar, "Searching", &format!("{searches} vectors of scales"));
    }
    Ok(())
}

/// What TensorRT-RTX would say only after minutes: Turing has no kernels for INT4 nor for bfloat16.
fn check_gpus(compiled: &Compiled, gpus: &[u32]) -> Result<(), Failure> {
    let formats = compiled.networks.iter().flat_map(|passed| &passed.assignments).filter_map(|choice| choice.format);
    let int4 = formats.into_iter().any(|format| format.dtype() == graphs::DType::Int4);
    let lacking = if int4 {
        "INT4 weights"
    } else if compiled.dtype == graphs::DType::Bfloat16 {
        "bfloat16"
    } else {
        return Ok(());
    };
    if gpus.contains(&75) {
        return Err(Failure::new(Exit::Refused, format!("{lacking} cannot be built for sm75"))
            .hint(Some("leave sm75 out of --gpu, or use int8 and float16".into())));
    }
    Ok(())
}

/// In order and once each: TensorRT-RTX takes repeated ones without a word.
fn gpus(options: &ModelOptions) -> Vec<u32> {
    let gpus: std::collections::BTreeSet<u32> = options.gpu.iter().copied().collect();
    gpus.into_iter().collect()
}

/// The last part of a folder's path, or the hub id: no path of this machine goes into the directory.
pub(super) fn name(model: &str) -> String {
    let path = Path::new(model);
    let folder = path.is_dir().then(|| path.canonicalize().ok()).flatten();
    let last = folder.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    last.unwrap_or_else(|| model.to_owned())
}

/// The command that builds the same again, with every value that decides the result.
fn command(args: &BuildArgs) -> String {
    let options = &args.options;
    let targets = [Target::Rtx, Target::Tensorrt, Target::Reference].into_iter();
    let targets: Vec<&str> = targets.filter(|target| options.target.contains(target)).map(Target::name).collect();
    let gpus: Vec<String> = gpus(options).iter().map(|gpu| format!("sm{gpu}")).collect();
    let dtype = options.dtype.0.map_or("auto", graphs::DType::name);
    let mut text = format!("trtvlm build {} -o DIR --target {}", name(&options.model), targets.join(","));
    if let Some(language) = &options.language {
        text += &format!(" --language {}", name(language));
    }
    if let Some(tower) = &options.vision_tower {
        text += &format!(" --vision-tower {}", name(tower));
    }
    if let Some(tokenizer) = &options.tokenizer {
        text += &format!(" --tokenizer {}", name(&tokenizer.to_string_lossy()));
    }
    if options.target.contains(&Target::Rtx) || !options.target.contains(&Target::Tensorrt) {
        text += &format!(" --gpu {}", gpus.join(","));
    }
    text += &format!(
        " --dtype {dtype} --quant {} --vision-quant {} --max-batch-size {}",
        options.quant, options.vision_quant, options.max_batch_size
    );
    if options.calibration.is_some() {
        text += " --calibration STATISTICS";
    }
    if options.kv_cache == KvCache::Int8 {
        text += " --kv-cache int8";
    }
    let sizes = [
        ("--max-input-len", options.max_input_len),
        ("--max-output-len", options.max_output_len),
        ("--max-multimodal-len", options.max_multimodal_len),
    ];
    for (flag, size) in sizes {
        if let Some(size) = size {
            text += &format!(" {flag} {size}");
        }
    }
    if options.tp > 1 {
        text += &format!(" --tp {} --embedding-sharding {}", options.tp, options.embedding_sharding.name());
    }
    if let Some(level) = args.optimization_level {
        text += &format!(" --optimization-level {level}");
    }
    if !args.mark.is_empty() {
        text += &format!(" --mark {}", args.mark.iter().map(|mark| format!("'{mark}'")).collect::<Vec<_>>().join(" "));
    }
    text
}

/// A flag that Ctrl-C sets; the build then stops its children and leaves nothing behind.
fn on_interrupt() -> Result<&'static AtomicBool, Failure> {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    match ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)) {
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(&INTERRUPTED),
        Err(error) => Err(Failure::of(Exit::Environment, &error)),
    }
}

/// One bar at a time, for all engines that are being built.
struct Reporter<'p> {
    printer: &'p Printer,
    step: Option<(String, Progress)>,
    /// How far each engine is, in thousandths.
    working: BTreeMap<String, u64>,
    /// By number of the network.
    engines: BTreeMap<usize, Value>,
}

impl Reporter<'_> {
    fn step(&mut self, verb: &str, text: &str) -> &Progress {
        let key = format!("{verb} {text}");
        if self.step.as_ref().is_none_or(|(current, _)| *current != key) {
            self.end();
            self.step = Some((key, self.printer.progress(verb, text, 1)));
        }
        let printer = self.printer;
        &self.step.get_or_insert_with(|| (String::new(), printer.progress(verb, text, 1))).1
    }

    fn end(&mut self) {
        self.step = None;
    }

    fn see(&mut self, event: Event<'_>) {
        match event {
            Event::Waiting(path) => {
                self.printer.status("Waiting", &format!("for the build that works in {}", path.display()));
            }
            Event::Weights { network, done, total } => {
                let text = format!("{network} weights");
                self.step("Writing", &text).set(done, total);
                if done == total {
                    let (_, progress) = self
                        .step
                        .take()
                        .unwrap_or_else(|| (String::new(), self.printer.progress("Writing", &text, total)));
                    self.printer.finish(progress, "Writing", &format!("{text}, {}", bytes(total)));
                }
            }
            Event::Engine { network, event: BuildEvent::Progress { step, steps, .. } } => {
                let done = u64::from(step) * 1000 / u64::from(steps).max(1);
                self.working.insert(network.to_owned(), done.min(1000));
                // What is written has the bar while it lasts.
                if self.step.as_ref().is_none_or(|(key, _)| !key.starts_with("Writing")) {
                    let names: Vec<&str> = self.working.keys().map(String::as_str).collect();
                    let plural = if names.len() > 1 { "s" } else { "" };
                    let text = format!("{} engine{plural}", names.join(", "));
                    let (done, total) = (self.working.values().sum(), 1000 * self.working.len() as u64);
                    self.step("Building", &text).set(done, total);
                }
            }
            Event::Engine { event: BuildEvent::Log(line), .. } => self.printer.note(line),
            Event::Built { number, network, engine } => {
                self.end();
                self.working.remove(network);
                let value = json!({
                    "network": network, "bytes": engine.bytes, "seconds": engine.seconds,
                    "peak_own_memory_bytes": engine.peak_own_bytes,
                    "peak_resident_memory_bytes": engine.peak_resident_bytes,
                });
                self.engines.insert(number, value);
                self.printer.status(
                    "Building",
                    &format!(
                        "{network} engine, {} in {:.2} s, peak own memory {}",
                        bytes(engine.bytes),
                        engine.seconds,
                        bytes(engine.peak_own_bytes)
                    ),
                );
            }
        }
    }
}
