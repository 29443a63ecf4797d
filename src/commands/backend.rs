//! `backend`: TensorRT libraries, found and fetched.
use crate::backend::{self, BackendError, Environment, Install, Kind};
use crate::cli::BackendCommand;
use crate::failure::{Exit, Failure};
use crate::plugins::Nvrtc;
use crate::report::{Printer, bytes, table};
use serde_json::json;
use tensorrt_sys::Library;

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Failure {
        Failure::of(Exit::Environment, &error).hint(error.hint())
    }
}

pub fn run(command: &BackendCommand, printer: &Printer) -> Result<(), Failure> {
    match command {
        BackendCommand::List => list(printer),
        BackendCommand::Install { name, force, from } => install(name, *force, from.clone(), printer),
    }
}

/// Also what `demo` does first.
pub(super) fn install(
    name: &str,
    force: bool,
    from: Option<std::path::PathBuf>,
    printer: &Printer,
) -> Result<(), Failure> {
    let environment = Environment::of_process();
    let wheel = backend::WHEELS.iter().find(|wheel| wheel.name == name);
    let wheel = wheel.ok_or_else(|| Failure::new(Exit::Usage, format!("no library is called `{name}`")))?;
    let text = format!("{} {}", wheel.title, wheel.version);
    let bar = printer.progress("Fetching", &text, 1);
    let progress = |done, total| bar.set(done, total);
    let installed = backend::install(&Install { wheel, environment: &environment, force, from, progress: &progress })?;
    drop(bar);
    let verb = if installed.kept { "Installed" } else { "Installing" };
    let already = if installed.kept { " already" } else { "" };
    printer.status(verb, &format!("{text} is{already} at {}", installed.path.display()));
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "path": installed.path, "kept": installed.kept }));
    }
    Ok(())
}

fn list(printer: &Printer) -> Result<(), Failure> {
    let driver = backend::has_driver();
    let mut rows = Vec::new();
    let mut entries = Vec::new();
    for found in backend::list(&Environment::of_process()) {
        let opened = match found.kind {
            Kind::Nvrtc => {
                Nvrtc::open(&found.path).and_then(|nvrtc| nvrtc.version()).map_err(|error| error.to_string())
            }
            _ => Library::open(&found.path).map(Library::name).map_err(|error| error.to_string()),
        };
        let works = opened.is_ok();
        let version = opened.unwrap_or_else(|error| error);
        let use_here = match (found.kind, works) {
            (_, false) => "nothing: it does not load",
            (Kind::Rtx, _) => "builds for sm75 to sm121 on the CPU",
            (Kind::Nvrtc, _) => "compiles kernels for --target tensorrt",
            (Kind::Tensorrt, _) if driver => "builds and runs engines for the GPU here",
            (Kind::Tensorrt, _) => "nothing: it needs a CUDA GPU",
        };
        let size = std::fs::metadata(&found.path).map_or(0, |metadata| metadata.len());
        entries.push(json!({ "path": found.path, "version": version, "loads": works, "use": use_here, "bytes": size }));
        rows.push(vec![version, bytes(size), use_here.to_owned(), found.path.display().to_string()]);
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "libraries": entries, "cuda_driver": driver }));
    } else if rows.is_empty() {
        printer.data("no TensorRT library was found; `trtvlm backend install rtx` gets one");
    } else {
        printer.data(&table(&["version", "size", "here", "path"], &rows));
    }
    Ok(())
}
