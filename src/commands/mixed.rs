//! `auto:BITS` becomes a recipe before a model is compiled.
use super::build::quiet_options;
use crate::compile::Request;
use crate::failure::Failure;
use crate::mixed::{Part, choose, wanted};
use crate::report::Printer;

/// The request with recipes for the parts that leave theirs to be chosen; any other as it is.
pub(super) fn resolve(request: &Request, printer: &Printer) -> Result<Request, Failure> {
    let mut resolved = request.clone();
    for (part, name) in [(Part::Language, &request.quant), (Part::Vision, &request.vision_quant)] {
        let known = match part {
            Part::Language => &mut resolved.chosen.language,
            Part::Vision => &mut resolved.chosen.vision,
        };
        let Some(bits) = wanted(name)?.filter(|_| known.is_none()) else { continue };
        let bar = printer.progress("Choosing", "formats", 1);
        let found = choose(request, part, bits, &quiet_options(), &|done, total| bar.set(done, total))?;
        let text = format!("formats of {} layers, {:.3} bits a weight,", found.layers, found.bits);
        printer.finish(bar, "Choosing", &text);
        *known = Some(found.text);
    }
    Ok(resolved)
}
