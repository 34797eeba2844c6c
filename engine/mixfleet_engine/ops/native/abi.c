/* What the library says of itself. */
#include "mf_abi.h"

int32_t mf_abi_version(void)
{
    return MF_ABI_VERSION;
}
