//! TensorRT's log, kept so that a failure carries the message that tells its cause.
use crate::abi::{InterfaceInfo, Object, Table, api_language, no_destructor};
use crate::{Family, slots};
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

/// How grave a message is; values are TensorRT's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Internal,
    Error,
    Warning,
    Info,
    Verbose,
}

impl Severity {
    fn from_value(value: i32) -> Severity {
        match value {
            0 => Severity::Internal,
            1 => Severity::Error,
            2 => Severity::Warning,
            3 => Severity::Info,
            _ => Severity::Verbose,
        }
    }
}

type Listener = Box<dyn Fn(Severity, &str) + Send>;

#[derive(Default)]
struct State {
    errors: Vec<String>,
    layers: Option<String>,
    listener: Option<Listener>,
}

/// An `ILogger`. TensorRT holds on to it for the life of the process, so it is never freed.
#[repr(C)]
pub(crate) struct Log {
    table: *const c_void,
    state: Mutex<State>,
}

// SAFETY: the table is constant and the rest is behind a lock.
unsafe impl Sync for Log {}

impl Log {
    pub(crate) fn leak(family: Family) -> &'static Log {
        // Before version 11 the logger is a plain class: its one method comes before the destructors.
        let plain = slots::logger::LOG.slot(family) == Some(0);
        let table = if plain { PLAIN.pointer() } else { VERSIONED.pointer() };
        Box::leak(Box::new(Log { table, state: Mutex::default() }))
    }

    pub(crate) fn object(&'static self) -> Object {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The errors since the last call.
    pub(crate) fn take_errors(&self) -> Vec<String> {
        std::mem::take(&mut self.state().errors)
    }

    /// The builder's description of the engine's layers, where detailed verbosity was asked for.
    pub(crate) fn take_layers(&self) -> Option<String> {
        self.state().layers.take()
    }

    pub(crate) fn listen(&self, listener: Listener) {
        self.state().listener = Some(listener);
    }

    pub(crate) fn message(&self, severity: Severity, text: &str) {
        let mut state = self.state();
        if let Some(listener) = &state.listener {
            listener(severity, text);
        }
        // Without a driver every failing shape query adds this one, which is not the cause.
        let noise = text.contains("catchCudaError");
        if severity <= Severity::Error && !noise {
            state.errors.push(text.trim().to_owned());
        }
        if text.starts_with("Layers:") {
            state.layers = Some(text.to_owned());
        }
    }
}

static PLAIN: Table<3> = Table::new([log as _, no_destructor as _, no_destructor as _]);
static VERSIONED: Table<5> =
    Table::new([api_language as _, info as _, no_destructor as _, no_destructor as _, log as _]);

extern "C" fn info(_: Object) -> InterfaceInfo {
    InterfaceInfo { kind: c"ILogger".as_ptr(), major: 1, minor: 0 }
}

extern "C" fn log(this: Object, severity: i32, text: *const c_char) {
    // A panic must not cross into C++.
    let _ = std::panic::catch_unwind(|| {
        // SAFETY: TensorRT passes the logger it was given, which is never freed, and a C string or null.
        let (log, text) = unsafe {
            let text = if text.is_null() { c"" } else { CStr::from_ptr(text) };
            (&*this.cast::<Log>(), text.to_string_lossy())
        };
        log.message(Severity::from_value(severity), &text);
    });
}
