//! trtvlm compiles vision-language checkpoints into TensorRT engines.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]
pub mod assemble;
pub mod backend;
pub mod builder;
pub mod calibration;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod compile;
pub mod cost;
pub mod device;
pub mod engine_dir;
pub mod failure;
pub mod limits;
pub mod lower;
pub mod passes;
pub mod plugins;
pub mod processor;
mod random;
pub mod report;
pub mod runtime;
pub mod samples;
pub mod score;
pub mod source;
pub mod synth;
pub mod teach;
pub mod verify;
pub mod vision_tower;
