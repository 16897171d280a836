//! What the levels of all architectures share: tokens and their intrinsics.

/// What makes a type a token: it can only be built where `$detector` finds the
/// features of its level, and here is the one place where kernels are compiled with
/// them.
macro_rules! token {
    ($name:ident, $detector:ident, $($feature:tt),+) => {
        impl $name {
            pub fn detect() -> Option<$name> {
                ($($detector!($feature))&&+).then_some(Self(()))
            }

            /// Runs a kernel compiled for this level.
            #[inline(always)]
            pub fn dispatch<O: Op>(self, op: O) -> O::Output {
                #[target_feature($(enable = $feature),+)]
                fn run<O: Op>(token: $name, op: O) -> O::Output {
                    op.run(token)
                }
                // SAFETY: the token exists, so detection found every feature
                // that `run` is compiled with.
                unsafe { run(self, op) }
            }

            /// Runs a kernel of bytes compiled for this level.
            #[inline(always)]
            pub fn dispatch_dots<O: DotsOp>(self, op: O) -> O::Output {
                #[target_feature($(enable = $feature),+)]
                fn run<O: DotsOp>(token: $name, op: O) -> O::Output {
                    op.run(token)
                }
                // SAFETY: as for `dispatch`.
                unsafe { run(self, op) }
            }
        }
    };
}

/// Wraps intrinsics of the token's level.
macro_rules! intrinsics {
    ($(fn $name:ident(self $(, $arg:ident: $ty:ty)*) $(-> $ret:ty)? $body:block)+) => {
        $(
            #[inline(always)]
            fn $name(self $(, $arg: $ty)*) $(-> $ret)? {
                // SAFETY: the token proves that the CPU has the instructions;
                // loads and stores touch exactly the arrays they are given.
                unsafe { $body }
            }
        )+
    };
}

pub(super) use {intrinsics, token};
