//! Part of the weight that the factors start as.

use burn::module::LoraAdapter;
use lowrank_kernels::host::values as host;

use crate::ground::error::AdapterError;
use crate::ground::site::Site;
use crate::ground::structure::Structure;

/// Initial product of the factors, if they start as part of the weight.
pub(crate) fn origin(site: &mut Site<'_>, structure: &dyn Structure) -> Result<Option<LoraAdapter>, AdapterError> {
    if !site.spec.init(&site.place.init).is_some_and(|init| init.starts_from_weight) && !structure.starts_from_weight()
    {
        return Ok(None);
    }
    let Some([a, b]) = structure.product() else {
        return Err(AdapterError::Refused(format!(
            "{} has no factors that begin as part of the weight",
            site.spec.name
        )));
    };
    let ([d_in, d_out], rank, scale) = (site.place.shape, site.place.rank, site.place.scale);
    Ok(Some(LoraAdapter {
        a: site.frozen("origin.a", [d_in, rank], |_| Ok(host(a)))?,
        b: site.frozen("origin.b", [rank, d_out], |_| Ok(host(b.div_scalar(scale))))?,
        scale,
    }))
}
