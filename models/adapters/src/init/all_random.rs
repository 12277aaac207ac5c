//! Initialisation `all-random`.

use crate::ground::initialisation::Initialisation;

/// Draws the tensors that are zero by default too, as `init_weights = False` in `peft`.
pub(crate) const ALL_RANDOM: Initialisation = Initialisation {
    changes_output: true,
    ..Initialisation::plain(
        "all-random",
        "draws the tensors that are zero by default too; changes the output, as init_weights = False in peft",
        &[],
    )
};
