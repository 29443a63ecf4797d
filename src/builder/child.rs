//! The child's side: one engine, then the end.
use super::timings::Timings;
use super::{ChildMessage, EngineSpec, LocalSpec, MARK, status_bytes};
use crate::device::{Device, DeviceError, Gpu};
use crate::lower::{self, Constants, LowerError};
use crate::plugins::{self, Compiler};
use graphs::GraphError;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tensorrt_sys as trt;
use thiserror::Error;

#[derive(Debug, Error)]
enum ChildError {
    #[error("cannot use `{path}`")]
    File { path: PathBuf, source: std::io::Error },
    #[error("cannot read `{path}`")]
    Spec { path: PathBuf, source: serde_json::Error },
    #[error("the network is damaged")]
    Graph(#[from] GraphError),
    #[error("TensorRT refused the network")]
    Lower(#[from] LowerError),
    #[error("the GPU cannot be used")]
    Device(#[from] DeviceError),
    #[error("TensorRT could not build the engine")]
    TensorRt(#[from] trt::Error),
}

/// Builds the engine of a spec file and tells the parent, line by line on standard output, how it goes.
/// Gives whether it went well.
pub fn build_engine(spec: &Path) -> bool {
    // A parent that closes the pipe is gone, and then so is this process soon.
    let say = |message: &ChildMessage| {
        if let Ok(text) = serde_json::to_string(message) {
            let _ = writeln!(std::io::stdout(), "{MARK}{text}");
        }
    };
    trt::die_with_parent();
    let built = build(spec, &say);
    match built {
        Ok(done) => {
            say(&done);
            true
        }
        Err(error) => {
            say(&failed(&error));
            false
        }
    }
}

fn build(spec: &Path, say: &(dyn Fn(&ChildMessage) + Sync)) -> Result<ChildMessage, ChildError> {
    let start = Instant::now();
    let file = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ChildError::File { path, source }
    };
    let text = std::fs::read(spec).map_err(file(spec))?;
    let spec: EngineSpec =
        serde_json::from_slice(&text).map_err(|source| ChildError::Spec { path: spec.into(), source })?;
    if spec.local.is_none() {
        trt::steady().map_err(|source| ChildError::File { path: "/proc/self/exe".into(), source })?;
    }
    let network = graphs::parse(&std::fs::read_to_string(&spec.network).map_err(file(&spec.network))?)?;
    graphs::verify(&network)?;
    let library = trt::Library::open(&spec.library)?;
    library.on_log(|severity, text| {
        if severity <= trt::Severity::Warning {
            let _ = writeln!(std::io::stderr(), "{}", text.trim());
        }
    });
    let local = spec.local.as_ref().map(|local| Local::open(local, library)).transpose()?;
    let builder = trt::Builder::new(library)?;
    let constants = Constants::open(spec.constants).map_err(LowerError::from)?;
    let target = builder.network(&spec.name)?;
    let compiler = local.as_ref().map(|local| &local.compiler);
    lower::lower(&network, &target, &constants, spec.sizes, compiler)?;
    let options = trt::BuildOptions {
        profiles: lower::profiles(&network, &spec.sizes),
        compute_capabilities: spec.gpus,
        describe: false,
        optimization_level: spec.optimization_level,
        timing_cache: local.as_ref().and_then(|local| local.timings.read()),
        // Ranks wait for each other on the GPU: what one rank needs must not lie behind the waiting of another.
        one_stream: network.nodes.iter().any(|node| node.op.is_collective()),
    };
    let mut out = BufWriter::new(File::create(&spec.engine).map_err(file(&spec.engine))?);
    let summary = builder.build_to(&target, &options, &mut out, &mut |trt::Progress { phase, step, steps }| {
        say(&ChildMessage::Progress { phase, step, steps });
        ControlFlow::Continue(())
    })?;
    out.into_inner().map_err(|error| file(&spec.engine)(error.into_error()))?;
    if let (Some(local), Some(measured)) = (&local, &summary.timing_cache) {
        local.timings.write(measured);
    }
    let gpu = local.map(|local| local.gpu);
    let seconds = start.elapsed().as_secs_f64();
    let (library, peak_resident_bytes) = (library.name(), status_bytes("self", "VmHWM"));
    let (bytes, sha256) = (summary.bytes, summary.sha256);
    Ok(ChildMessage::Done { bytes, sha256, library, gpu, seconds, peak_resident_bytes })
}

/// The GPU at hand and what building for it takes.
struct Local {
    gpu: Gpu,
    compiler: Compiler,
    timings: Timings,
}

impl Local {
    fn open(spec: &LocalSpec, library: &'static trt::Library) -> Result<Local, ChildError> {
        let gpu = Device::open()?.gpu()?;
        plugins::register(library)?;
        let compiler = Compiler::new(&spec.nvrtc, gpu.capability).map_err(LowerError::from)?;
        let timings = Timings::new(spec.timings.as_deref(), &library.name(), &gpu);
        Ok(Local { gpu, compiler, timings })
    }
}

fn failed(error: &ChildError) -> ChildMessage {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let text = cause.to_string();
        if causes.last() != Some(&text) {
            causes.push(text);
        }
        source = cause.source();
    }
    // TensorRT's log often holds more than the first message, which is the cause's text already.
    let refused = match error {
        ChildError::TensorRt(error) | ChildError::Lower(LowerError::Layer { source: error, .. }) => Some(error),
        _ => None,
    };
    if let Some(trt::Error::Refused { messages }) = refused {
        causes.extend(messages.iter().skip(1).cloned());
    }
    let hint = match error {
        ChildError::TensorRt(error) => error.hint(),
        ChildError::Device(error) => error.hint(),
        _ => None,
    };
    ChildMessage::Failed { message: error.to_string(), causes, hint }
}
