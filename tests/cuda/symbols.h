/* symbols.h: the name of a function of this program or library, static ones too. */
#ifndef EMULATED_SYMBOLS_H
#define EMULATED_SYMBOLS_H

#include <string>

/* Without its arguments, and without those of a template: "residual_norm_backward_kernel". */
std::string emulate_kernel_name(const void *function);

#endif
