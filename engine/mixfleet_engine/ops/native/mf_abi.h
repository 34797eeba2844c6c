/* Version of all structures and functions that Python calls; library.py has the same number. */
#ifndef MF_ABI_H
#define MF_ABI_H

#include <stdint.h>

#define MF_ABI_VERSION 1

int32_t mf_abi_version(void);

#endif
