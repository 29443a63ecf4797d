//! The commands, one file each: arguments in, the library's work, a report out.
pub mod backend;
pub mod bench;
pub mod build;
pub mod calibrate;
pub mod convert;
pub mod demo;
pub mod eval;
pub mod inspect;
mod mixed;
pub mod plan;
mod quality;
pub mod run;
pub mod synth;
pub mod verify;
