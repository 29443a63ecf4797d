//! The builder's progress, and the way to stop it.
use crate::abi::{InterfaceInfo, Object, Table, api_language, no_destructor};
use std::ffi::{CStr, c_char, c_void};
use std::ops::ControlFlow;
use std::sync::Mutex;

/// A step of the builder's outermost phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: String,
    /// Steps done, of `steps`.
    pub step: u32,
    pub steps: u32,
}

pub(crate) type Listener<'l> = dyn FnMut(Progress) -> ControlFlow<()> + Send + 'l;

struct State<'l> {
    /// Open phases from the outermost in: name, steps.
    phases: Vec<(String, u32)>,
    listener: &'l mut Listener<'l>,
    cancelled: bool,
}

/// An `IProgressMonitor`; its methods may be called from several threads.
#[repr(C)]
pub(crate) struct Monitor<'l> {
    table: *const c_void,
    state: Mutex<State<'l>>,
}

static TABLE: Table<7> = Table::new([
    api_language as _,
    info as _,
    no_destructor as _,
    no_destructor as _,
    phase_start as _,
    step_complete as _,
    phase_finish as _,
]);

impl<'l> Monitor<'l> {
    pub(crate) fn new(listener: &'l mut Listener<'l>) -> Monitor<'l> {
        Monitor { table: TABLE.pointer(), state: Mutex::new(State { phases: Vec::new(), listener, cancelled: false }) }
    }

    pub(crate) fn object(&self) -> Object {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.with(|state| state.cancelled)
    }

    fn with<T>(&self, action: impl FnOnce(&mut State<'l>) -> T) -> T {
        action(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// Runs `action` on the monitor and the phase's name, panics kept on this side.
fn enter<T>(this: Object, name: *const c_char, fallback: T, action: impl FnOnce(&mut State, &str) -> T) -> T {
    let run = std::panic::AssertUnwindSafe(|| {
        // SAFETY: TensorRT passes the monitor it was given, alive during the build, and a C string or null.
        let (monitor, name) = unsafe {
            let name = if name.is_null() { c"" } else { CStr::from_ptr(name) };
            (&*this.cast::<Monitor>(), name.to_string_lossy())
        };
        monitor.with(|state| action(state, &name))
    });
    std::panic::catch_unwind(run).unwrap_or(fallback)
}

extern "C" fn info(_: Object) -> InterfaceInfo {
    InterfaceInfo { kind: c"IProgressMonitor".as_ptr(), major: 1, minor: 0 }
}

extern "C" fn phase_start(this: Object, name: *const c_char, _parent: *const c_char, steps: i32) {
    enter(this, name, (), |state, name| state.phases.push((name.into(), steps.max(0).cast_unsigned())));
}

/// Returning false makes TensorRT give up.
extern "C" fn step_complete(this: Object, name: *const c_char, step: i32) -> bool {
    enter(this, name, false, |state, name| {
        if let Some((outermost, steps)) = state.phases.first()
            && outermost == name
        {
            let step = step.max(0).cast_unsigned() + 1;
            let progress = Progress { phase: outermost.clone(), step, steps: *steps };
            state.cancelled |= (state.listener)(progress).is_break();
        }
        !state.cancelled
    })
}

extern "C" fn phase_finish(this: Object, name: *const c_char) {
    enter(this, name, (), |state, name| {
        if let Some(place) = state.phases.iter().rposition(|(phase, _)| phase == name) {
            state.phases.remove(place);
        }
    });
}
