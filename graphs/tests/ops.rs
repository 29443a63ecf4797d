//! Ops that no family writes but passes do, by their definitions, and what the verifier says where they do not belong.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{Weight, parse, verify};
use std::collections::BTreeMap;

/// Weights by name.
struct Known(BTreeMap<&'static str, Vec<f32>>);

impl Values for Known {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0[weight.key().as_str()].clone())
    }
}

const X: [f32; 8] = [1.0, -127.0, 0.5, 126.4, 0.0, 3.0, -0.25, 2.0];

/// What `line` makes of [`X`] as two rows of four, with the vector `v` and the number `s`; read by a matrix of ones if it is
/// rounded.
fn of_x(line: &str) -> Vec<f32> {
    let text = format!(
        "network toy float32\n%0 input = input() : float32[batch,4]\n%1 result = {line} : float32[batch,4]\n\
         %2 identity = linear(%1) {{\"weight\":{{\"tensor\":{{\"name\":\"identity\",\"shape\":[4,4]}}}}}} : float32[batch,4]\n\
         output output = %2\n"
    );
    let network = parse(&text).unwrap();
    verify(&network).unwrap();
    let identity = (0..16).map(|at| if at % 5 == 0 { 1.0 } else { 0.0 }).collect();
    let known = Known([("identity", identity), ("v", vec![1.0, 2.0, 4.0, -0.5]), ("s", vec![0.5])].into());
    let caches = &mut Caches::new(&network, 1, 0);
    let interpreter = Interpreter::new(network, &known).unwrap();
    let outputs =
        interpreter.run(&BTreeMap::from([("input", Array::float([2, 4], X.to_vec()))]), caches, None).unwrap();
    outputs["output"].floats().unwrap().to_vec()
}

#[test]
fn channels_are_scaled() {
    let by = r#"{"weight":{"tensor":{"name":"v","shape":[4]}}"#;
    assert_eq!(of_x(&format!("scale_by(%0) {by}}}")), [1.0, -254.0, 2.0, -63.2, 0.0, 6.0, -1.0, -1.0]);
    let divided = of_x(&format!("scale_by(%0) {by},\"divide\":true}}"));
    assert_eq!(divided, [1.0, -63.5, 0.125, -252.8, 0.0, 1.5, -0.0625, -4.0]);
}

#[test]
fn inputs_are_rounded() {
    // The first row by 127 / 127, the second by 3 / 127.
    let own = of_x("quantize_input(%0) {}");
    assert_eq!(own[..4], [1.0, -127.0, 0.0, 126.0]);
    let step = 3.0 / 127.0;
    for (found, steps) in std::iter::zip(&own[4..], [0.0, 127.0, -11.0, 85.0]) {
        assert!((found - steps * step).abs() < 1e-6, "{found}");
    }
    // The second row by 3 / 127.5, which clips the 3 itself.
    let wide = of_x(r#"quantize_input(%0) {"wide":true}"#);
    let step = 3.0 / 127.5;
    for (found, steps) in std::iter::zip(&wide[4..], [0.0, 127.0, -11.0, 85.0]) {
        assert!((found - steps * step).abs() < 1e-6, "{found}");
    }
    // By halves, clipped at -64 and 63.5; ties go to even.
    let given = of_x(r#"quantize_input(%0) {"scale":{"tensor":{"name":"s","shape":[]}}}"#);
    assert_eq!(given, [1.0, -64.0, 0.5, 63.5, 0.0, 3.0, 0.0, 2.0]);
}

#[test]
fn rounded_inputs_are_for_linear_layers() {
    let text = "network toy float32\n%0 input = input() : float32[batch,4]\n%1 rounded = quantize_input(%0) {} : float32[batch,4]\n\
                %2 sum = binary(%0, %1) {\"kind\":\"add\"} : float32[batch,4]\noutput output = %2\n";
    let error = verify(&parse(text).unwrap()).unwrap_err().to_string();
    assert!(error.contains("`sum`") && error.contains("reads `rounded`, which is for linear layers only"), "{error}");
}
